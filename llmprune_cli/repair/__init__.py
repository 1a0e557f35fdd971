"""Making up for what goes: the refit of what reads removed units, and the rotation of the residual stream."""

from __future__ import annotations

# What `--refit` offers, with one line for the docs.
REFITS = {
    "residual": "each output projection of attention and MLP is solved so that the residual stream follows the dense "
    "model's, dropped layers and earlier errors included",
    "local": "only what loses inputs is solved, to do what it did",
    "none": "nothing is solved",
}
