"""Define what one run specifies: the recipe's fields, how they are read, and which values they take."""
