"""Which units and layers go: by their importance, and by the search for a target size."""
