"""Reports of runs: console output, progress bar, TensorBoard events, metrics.csv, and comparisons of runs."""
