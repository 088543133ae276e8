"""What weights look like, and what training changed of them."""
