"""Tasks: the opinions. How many outputs, which loss, which metrics, and how to draw an answer."""
