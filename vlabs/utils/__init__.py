"""Files that are written whole, and which process this is."""
