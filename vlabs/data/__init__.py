"""From prepared folders to batches."""
