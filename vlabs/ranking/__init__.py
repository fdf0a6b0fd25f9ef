"""Scores of many texts with many images."""
