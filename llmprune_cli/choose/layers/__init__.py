"""What single layers are worth: their importance, and what removing a part of one costs."""
