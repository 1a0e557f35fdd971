"""The command line: parsing, tables, progress."""
