"""Configs, run folders, loggers, the record of a run and the table of a sweep."""
