"""Readers of raw text: find input files, decompress them, and yield their documents."""
