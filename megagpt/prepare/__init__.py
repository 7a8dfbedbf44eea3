"""Preparation of a tokenized corpus from raw text."""
