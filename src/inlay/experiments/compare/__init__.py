"""Methods compared on one task under one budget."""
