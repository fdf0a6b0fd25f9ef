"""Metrics that know no model: accuracy, recall, grounding, intervals."""
