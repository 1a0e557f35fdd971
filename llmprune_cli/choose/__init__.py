"""Importance of units and of layers, and the search for widths of a given size."""
