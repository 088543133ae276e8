"""What a run leaves to read."""
