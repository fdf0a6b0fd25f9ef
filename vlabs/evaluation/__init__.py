"""What `python -m vlabs.evaluate` measures, a module a task."""
