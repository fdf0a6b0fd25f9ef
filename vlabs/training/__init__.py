"""From a config to a training that runs, is monitored, and can be resumed."""
