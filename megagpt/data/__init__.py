"""The order of training samples, blends of corpora, and batches for training and evaluation."""
