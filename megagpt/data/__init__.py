"""What training reads: the order of samples, blends of corpora, and batches for training and evaluation."""
