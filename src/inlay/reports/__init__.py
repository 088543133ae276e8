"""Write what a run leaves to read: its page, its plots, its model card."""
