"""Tokenizers, which convert text to token ids and back, from SentencePiece, Hugging Face and tiktoken."""
