"""Training states: the grid, x_t, batches in the training layout."""
