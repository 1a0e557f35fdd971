"""How long models of some widths take to read and to write, whatever their weights are."""
