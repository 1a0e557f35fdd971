"""What a small twin says: which indices of which tensors belong together."""
