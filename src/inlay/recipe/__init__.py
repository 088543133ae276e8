"""Everything that one run says: its fields, how they are read, and what they may hold."""
