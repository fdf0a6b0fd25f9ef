"""Callbacks, one module per subject; the config group `callbacks` chooses them."""
