"""The commands `megagpt data`: inspect a corpus, verify all of it, merge several."""

from megagpt.corpora.inspecting import inspect
from megagpt.corpora.merging import merge
from megagpt.corpora.verifying import verify

__all__ = ["inspect", "merge", "verify"]
