"""Making up for what goes: the refit of what reads removed units, and the rotation of the residual stream."""
