import pytest

from megagpt.data.sources import DEFAULT, find_sources
from megagpt.errors import UserError


def test_files_and_folders_are_found_in_order(tmp_path):
    (tmp_path / "books" / "sub").mkdir(parents=True)
    (tmp_path / "books" / ".hidden").mkdir()
    for name in ("b.txt", "sub/a.md", "a.jsonl", "picture.png", ".notes.txt", ".hidden/c.txt"):
        (tmp_path / "books" / name).write_text(name)
    (tmp_path / "Z.TXT").write_text("zed")
    found = find_sources([str(tmp_path / "Z.TXT"), str(tmp_path / "books")])
    names = ["Z.TXT", "books/a.jsonl", "books/b.txt", "books/sub/a.md"]
    assert [source.path for source in found] == [str(tmp_path / name) for name in names]
    assert [source.size for source in found] == [3, 7, 5, 8]


@pytest.mark.parametrize("inputs", [[], [DEFAULT]])
def test_the_default_corpus_stands_for_itself(inputs):
    assert [source.path for source in find_sources(inputs)] == [DEFAULT]


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
        find_sources([str(tmp_path / "good.txt"), str(tmp_path / name)])
    assert str(error.value) == "megagpt: " + message.format(path=tmp_path / name)
