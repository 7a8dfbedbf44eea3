"""Evaluation of trained models, text generation, and export."""
