"""A quick start: libraries that load without pauses, and what earlier runs found out."""
