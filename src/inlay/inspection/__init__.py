"""Show what weights look like, and what training changed in them."""
