"""Raw text to a tokenized corpus: readers, chunks, workers, shards, packing and deduplication."""
