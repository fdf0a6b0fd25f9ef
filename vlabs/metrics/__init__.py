"""Metrics, independent of models: accuracy, recall, grounding, intervals."""
