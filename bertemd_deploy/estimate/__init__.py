"""How fast a graph would be on a CPU that is not here: its operators counted, timed by small benchmarks, scaled by facts."""
