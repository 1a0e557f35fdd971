"""Making up for what goes: the refit of what reads removed units, and the rotation of the residual stream."""

from __future__ import annotations

# What `--refit` offers, with one line for the docs.
REFITS = {
    "residual": "each output projection of attention and MLP, so that the residual stream follows the dense model's; "
    "this makes up for dropped layers and earlier errors, too",
    "local": "only projections that lose inputs, so that they give the output that they gave before",
    "none": "nothing",
}
