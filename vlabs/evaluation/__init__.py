"""The evaluations of `vlabs evaluate`, one module each."""
