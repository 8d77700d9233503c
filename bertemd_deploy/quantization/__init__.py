"""Int8 forms of a graph: how weights and activations become integers, and the search for one that keeps the accuracy."""
