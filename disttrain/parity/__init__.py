"""Does a recipe train the same in every layout? Runs it in several, and says what differs first, and why."""
