"""Run many trainings: comparisons of methods, and searches for a recipe."""
