"""What a pruned twin is held against: the dense one without what went."""
