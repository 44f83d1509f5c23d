import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradpress.train import UserError
from gradpress.train.text import (
    Document,
    load_documents,
    read_documents,
    split_documents,
    standard_library_documents,
)


def documents_of(count):
    return [Document(f"{number}.txt", f"text number {number}\n" * 3) for number in range(count)]


def test_standard_library_is_real_text_without_tests():
    documents = standard_library_documents()
    names = [document.name for document in documents]
    sources = [name for name in names if name.startswith("python/")]
    assert "python/argparse.py" in sources
    assert sources == sorted(sources, key=lambda name: name.split("/"))
    folders = {part for name in sources for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idle_test"}
    assert "topics/lambda" in names
    assert sum(len(document.text) for document in documents) > 1_000_000
    assert load_documents(()) == documents


def test_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    (tmp_path / "a.md").write_bytes(b"first\r\nline")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "zeros").write_bytes(b"\0\0")
    (tmp_path / "empty").write_text(" \n")
    single = tmp_path / "a.md"
    expected = [Document("a.md", "first\nline"), Document("b/x.txt", "second")]
    assert read_documents([str(tmp_path)]) == expected
    assert read_documents([str(tmp_path / "b"), str(single)]) == [
        Document("x.txt", "second"),
        Document("a.md", "first\nline"),
    ]


@pytest.mark.parametrize("name", ["missing", "binary", "empty"])
def test_bad_paths_are_named(tmp_path, name):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        read_documents([str(tmp_path / name)])


@given(count=st.integers(20, 200), seed=st.integers(0, 9))
def test_split_depends_on_contents_alone(count, seed):
    documents = documents_of(count)
    training, validation = split_documents(documents)
    assert len(validation) == -(-count // 20)
    assert sorted([*training, *validation], key=documents.index) == documents
    assert training == [document for document in documents if document in training]
    shuffled = [Document(f"renamed {document.name}", document.text) for document in documents]
    random.Random(seed).shuffle(shuffled)
    _, again = split_documents(shuffled)
    assert {document.text for document in again} == {document.text for document in validation}


def test_equal_documents_fall_on_one_side():
    documents = documents_of(30)
    copies = [Document(f"copy of {document.name}", document.text) for document in documents]
    training, validation = split_documents(documents + copies)
    assert not {d.text for d in training} & {d.text for d in validation}


def test_few_documents_are_cut_at_line_ends():
    lines = [f"line {number}: " + "x" * (number % 50) + "\n" for number in range(4000)]
    document = Document("book.txt", "".join(lines))
    training, validation = split_documents([document])
    pieces = sorted(training + validation, key=lambda piece: int(piece.name.split("#")[1]))
    assert "".join(piece.text for piece in pieces) == document.text
    assert all(len(piece.text) <= 4096 and piece.text.endswith("\n") for piece in pieces)
    assert len(validation) == -(-len(pieces) // 20)


def test_one_long_line_and_nothing():
    training, validation = split_documents([Document("a", "x" * 10_000)])
    assert training == []
    assert [document.text for document in validation] == ["x" * 10_000]
    assert split_documents([]) == ([], [])
