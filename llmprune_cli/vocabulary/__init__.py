"""The tokens that a model knows: which stay, and its tokenizer without the others."""
