"""Which widths and which units stay, and the document that says so."""
