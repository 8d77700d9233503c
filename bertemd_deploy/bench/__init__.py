"""What runs in, or beside, the measured process: workers, timing, memory and the comparison of models."""
