"""Search for the recipe with the lowest loss."""
