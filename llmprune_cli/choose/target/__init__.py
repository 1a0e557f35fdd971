"""What a target size is spent on, beside widths."""
