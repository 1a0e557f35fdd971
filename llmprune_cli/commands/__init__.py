"""One function for each command, without printing."""
