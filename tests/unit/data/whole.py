"""Documents whole, as no worker holds them."""

from megagpt.data.documents import Document, join_fragments
from megagpt.data.pieces import InputRange
from megagpt.data.reading import read_fragments


def whole_documents(sources, key, odd):
    """All documents of the sources, one after the other."""
    for number, source in enumerate(sources):
        for fragment in join_fragments(read_fragments(InputRange(number, source), key, odd)):
            name = f"{source.path}:{fragment.line}" if fragment.line else source.path
            yield Document(name, fragment.text, fragment.key)
