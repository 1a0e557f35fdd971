"""`sweep`: several sizes of one model, pruned and judged in one run that measures once."""
