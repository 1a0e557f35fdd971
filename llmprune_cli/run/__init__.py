"""Running a model one layer at a time over text, and what that tells: perplexity, divergence, speed."""
