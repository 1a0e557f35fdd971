"""Text as people have it: files of many kinds, columns, and conversations."""
