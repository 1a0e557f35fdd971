"""Blocks of quantized elements: which kind each matrix gets, and what encodes them."""
