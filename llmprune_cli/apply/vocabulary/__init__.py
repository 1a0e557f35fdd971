"""Cutting the rows of tokens, and the proof that this is right."""
