"""Tokenized corpora in Megatron's .bin/.idx format: reader, writer, metadata; inspect, verify and merge."""
