"""Implementation of `megagpt doctor`, which finds problems of a machine or cluster before training starts there."""
