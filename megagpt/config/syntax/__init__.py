"""Reading and writing YAML and JSON with the file and line of every value, for error messages."""
