"""What `megagpt data` does with corpora that are there: look into one, verify all of it, merge several."""

from megagpt.corpora.inspecting import inspect
from megagpt.corpora.merging import merge
from megagpt.corpora.verifying import verify

__all__ = ["inspect", "merge", "verify"]
