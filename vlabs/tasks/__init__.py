"""Tasks: Lightning modules that define losses and validation metrics."""
