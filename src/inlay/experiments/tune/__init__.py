"""The search for the recipe of the least loss."""
