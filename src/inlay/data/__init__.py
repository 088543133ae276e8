"""Records in, tokens out."""
