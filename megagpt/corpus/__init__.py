"""Tokenized corpora in Megatron's .bin/.idx format, and the `megagpt data` commands for them."""
