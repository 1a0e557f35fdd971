"""What a configuration says: widths, their fields, per-layer lists, exceptions."""
