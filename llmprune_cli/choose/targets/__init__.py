"""The search for widths that fit a target: a size, or a time."""
