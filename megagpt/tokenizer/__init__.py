"""Tokenizers: text to token ids and back, with sentencepiece, Hugging Face or tiktoken vocabularies."""
