"""One module for each way of choosing; `trio.pruning.select` has them by name."""
