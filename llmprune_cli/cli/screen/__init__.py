"""What is shown: results on stdout, progress and warnings on stderr."""
