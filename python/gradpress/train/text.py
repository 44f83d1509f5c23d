"""Where training text comes from and how it is split into training and validation."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradpress.train.errors import UserError

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
VALIDATION_SHARE = 0.05
PIECE_CHARACTERS = 4096
_FEWEST_DOCUMENTS = 20


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: Path relative to the folder it was found in, with forward slashes.
        text: Its characters.
    """

    name: str
    text: str


def standard_library_documents() -> list[Document]:
    """Real text that every Python carries: its library's sources and its manual's topics.

    Sources come in the order of their paths relative to the library's folder. Installed packages,
    test folders and files that are not UTF-8 are left out. The topics of `pydoc_data.topics` are
    one document each, in the order of their names.

    Returns:
        The documents; empty files are dropped.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    topics_source = "pydoc_data/topics.py"
    documents = [
        Document(f"python/{name}", text)
        for name, text in _readable_files(root, suffix=".py")
        if name != topics_source
    ]
    documents += _manual_topics()
    return [document for document in documents if document.text.strip()]


def read_documents(paths: Sequence[str]) -> list[Document]:
    """Reads files and, recursively, folders.

    In a folder, hidden files, folders named like installed packages or tests, and files that are
    not UTF-8 text are passed over; a file that is named itself must be readable.

    Args:
        paths: Files and folders; their order is kept, a folder's files are sorted by path.

    Returns:
        The documents that hold more than white space.

    Raises:
        UserError: A path does not exist or is not text, or nothing was found.
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        if path.is_dir():
            documents += [Document(name, text) for name, text in _readable_files(path)]
        elif path.is_file():
            text = _read_text(path)
            if text is None:
                raise UserError(f"--text {path}: cannot be read as UTF-8 text")
            documents.append(Document(path.name, text))
        else:
            raise UserError(f"--text {path}: no such file or folder")
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise UserError(f"--text {' '.join(paths)}: no text found")
    return documents


def load_documents(paths: Sequence[str]) -> list[Document]:
    """The documents at `paths`, or the standard library's when there are none."""
    return read_documents(paths) if paths else standard_library_documents()


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Sets a twentieth of the documents apart for validation.

    The choice depends on contents alone: documents are ranked by the SHA-256 of their text, and
    the lowest twentieth (rounded up) is validation, so that equal documents fall on one side,
    and neither order nor names matter. Fewer than 20 documents are first cut, at line ends, into
    pieces of at most 4096 characters (a longer line stays whole), which are then ranked in the
    same way.

    Args:
        documents: The text.

    Returns:
        Training and validation documents, each in the given order.
    """
    if len(documents) < _FEWEST_DOCUMENTS:
        documents = [piece for document in documents for piece in _pieces(document)]
    digests = [hashlib.sha256(document.text.encode()).digest() for document in documents]
    count = -(-len(documents) // round(1 / VALIDATION_SHARE))
    last = sorted(digests)[count - 1] if documents else b""
    training = [text for text, digest in zip(documents, digests, strict=True) if digest > last]
    validation = [text for text, digest in zip(documents, digests, strict=True) if digest <= last]
    return training, validation


def _manual_topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return []
    return [Document(f"topics/{name}", topics[name]) for name in sorted(topics)]


def _pieces(document: Document) -> Iterator[Document]:
    lines: list[str] = []
    length = number = 0
    for line in document.text.splitlines(keepends=True):
        if lines and length + len(line) > PIECE_CHARACTERS:
            yield Document(f"{document.name}#{number}", "".join(lines))
            lines, length, number = [], 0, number + 1
        lines.append(line)
        length += len(line)
    if lines:
        yield Document(f"{document.name}#{number}", "".join(lines))


def _readable_files(root: Path, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the relative path and the text of the files below a folder, sorted by path."""
    for path in sorted(root.rglob(f"*{suffix}"), key=lambda found: found.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if any(part in EXCLUDED_FOLDERS or part.startswith(".") for part in parts):
            continue
        text = _read_text(path) if path.is_file() else None
        if text is not None:
            yield "/".join(parts), text


def _read_text(path: Path) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text.replace("\r\n", "\n")
