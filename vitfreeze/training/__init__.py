"""Training a model: the loop, the two tasks that it serves, and all that a run must remember."""
