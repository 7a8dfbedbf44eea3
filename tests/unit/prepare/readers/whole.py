"""Complete documents, joined from the fragments in which workers read them."""

from megagpt.prepare.chunks import InputRange
from megagpt.prepare.readers.documents import Document, join_fragments
from megagpt.prepare.readers.reader import read_fragments


def whole_documents(files, key, warnings):
    """Yield all documents of the input files, in order."""
    for number, file in enumerate(files):
        for fragment in join_fragments(read_fragments(InputRange(number, file), key, warnings)):
            name = f"{file.path}:{fragment.line}" if fragment.line else file.path
            yield Document(name, fragment.text, fragment.key)
