"""Readers of YAML and JSON that record the file and line of every value, and formatting for error messages."""
