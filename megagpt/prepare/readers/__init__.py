"""Readers of raw text, which find input files, decompress them, and yield their documents."""
