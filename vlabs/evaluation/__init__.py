"""What `vlabs evaluate` measures, a module a task."""
