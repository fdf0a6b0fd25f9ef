"""Checkpoint files, pre-trained and released weights, and the start that comes with vlabs."""
