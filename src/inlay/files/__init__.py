"""Write files and folders whole or not at all, cache tensors, and read untrusted JSON and YAML."""
