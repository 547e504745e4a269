"""Reports: figures, TensorBoard events, the progress bar, tables and metrics.csv. Plain data in, nothing
judged."""
