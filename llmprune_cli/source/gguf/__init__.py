"""GGUF files as input: what a header says, and weights made plain."""
