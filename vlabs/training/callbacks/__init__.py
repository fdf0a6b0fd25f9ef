"""What watches a run, a module a subject; which of them, says the group `callbacks` of the config."""
