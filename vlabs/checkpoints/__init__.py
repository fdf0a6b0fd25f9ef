"""Checkpoint files, pre-trained and released weights, and the models that come with vlabs."""
