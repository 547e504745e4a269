"""Tasks: outputs, loss, metrics and plots of classification, segmentation and keypoint localization."""
