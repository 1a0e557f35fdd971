"""Cutting tensors by a plan, writing them, and the proof on a twin that this is right."""
