"""What a run remembers, for `--resume` and for `--statistics`."""
