"""What every command that leaves a run folder needs: its config, loggers, environment and table of a sweep."""
