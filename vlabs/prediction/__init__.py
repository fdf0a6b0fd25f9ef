"""Trained models in use: answers to questions, and search in a folder of images."""
