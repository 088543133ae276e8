"""Compare methods on one task under one budget."""
