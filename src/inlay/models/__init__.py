"""Base models and adapters: how they are found, loaded and read weight by weight."""
