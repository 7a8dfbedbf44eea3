"""`megagpt doctor`: find what would stop training on this machine or cluster, before training starts there."""
