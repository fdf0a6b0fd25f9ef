"""From a config to a training that runs, is watched, and goes on where it was stopped."""
