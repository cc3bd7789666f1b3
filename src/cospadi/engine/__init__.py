"""Plan, run, journal: from a recipe to a checkpoint."""
