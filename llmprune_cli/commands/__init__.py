"""One function for each command: it does the work and returns what came of it, without printing."""
