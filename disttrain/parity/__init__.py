"""Check that a recipe trains the same in several layouts, and report the first difference and its causes."""
