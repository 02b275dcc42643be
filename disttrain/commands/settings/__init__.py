"""Reading a configuration, and explaining what is wrong with it."""
