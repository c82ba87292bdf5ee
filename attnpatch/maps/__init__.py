"""Block maps: their fields, files, tables and words."""
