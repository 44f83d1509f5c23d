"""Token arrays of a run, cached in its folder, and the batches that are cut from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from gradpress.train.config import TrainConfig
from gradpress.train.errors import UserError
from gradpress.train.files import whole_folder, write_atomically, write_json
from gradpress.train.text import Document, load_documents, split_documents
from gradpress.train.tokenizer import (
    END_OF_TEXT_ID,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenArray = npt.NDArray[Any]  # uint16 or uint32


@dataclass(frozen=True)
class TokenData:
    """Tokenized text.

    Attributes:
        train: One-dimensional array of token ids, mapped from its file.
        validation: The same for the validation text.
        digest: SHA-256 over both arrays, in hexadecimal.
        description: What `data/data.json` says: counts of documents, characters and tokens.
    """

    train: TokenArray
    validation: TokenArray
    digest: str
    description: dict[str, Any]


def prepare_tokens(config: TrainConfig, folder: Path) -> TokenData:
    """Reads, splits and tokenizes the text, or takes what the run's folder holds already.

    Writes `tokenizer.json`, `data/train.npy`, `data/validation.npy` and `data/data.json`. The
    tokenizer is trained on the training part alone.

    Args:
        config: The run.
        folder: Its folder.

    Returns:
        The arrays.

    Raises:
        UserError: A path is bad, or the text is too short for one window.
    """
    data = folder / "data"
    if not (data / "data.json").exists():
        print("reading and tokenizing the text", flush=True)
        _write_tokens(config, folder, data)
    description = json.loads((data / "data.json").read_text(encoding="utf-8"))
    train = np.load(data / "train.npy", mmap_mode="r")
    validation = np.load(data / "validation.npy", mmap_mode="r")
    for name, array in (("training", train), ("validation", validation)):
        if len(array) < 2 * config.sequence_length + 1:
            raise UserError(
                f"the {name} text has {len(array)} tokens; "
                f"--sequence-length {config.sequence_length} needs at least "
                f"{2 * config.sequence_length + 1}"
            )
    return TokenData(train, validation, description["digest"], description)


def copy_tokens(source: Path, folder: Path) -> None:
    """Gives a new run the tokenizer and the tokens of another one."""
    write_atomically(folder / "tokenizer.json", (source / "tokenizer.json").read_bytes())
    with whole_folder(folder / "data") as target:
        shutil.copytree(source / "data", target, dirs_exist_ok=True)


def _write_tokens(config: TrainConfig, folder: Path, data: Path) -> None:
    training, validation = split_documents(load_documents(config.text))
    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.exists():
        texts = (document.text for document in training)
        save_tokenizer(train_tokenizer(texts, config.vocab_size), tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    digest = hashlib.sha256()
    description: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    with whole_folder(data) as target:
        for name, documents in (("train", training), ("validation", validation)):
            array = encode(tokenizer, documents)
            np.save(target / f"{name}.npy", array)
            digest.update(array.tobytes())
            description[name] = {
                "documents": len(documents),
                "characters": sum(len(document.text) for document in documents),
                "tokens": len(array),
            }
        description["digest"] = digest.hexdigest()
        write_json(target / "data.json", description)


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> TokenArray:
    """Token ids of all documents in a row, each closed by the end-of-text token.

    Returns:
        One-dimensional array, uint16 where the vocabulary fits, else uint32.
    """
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    encodings = tokenizer.encode_batch_fast([document.text for document in documents])
    parts: list[TokenArray] = []
    for encoding in encodings:
        parts += [np.array(encoding.ids, dtype=dtype), np.array([END_OF_TEXT_ID], dtype=dtype)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def training_batch(
    tokens: TokenArray, batch: int, *, seed: int, batch_size: int, sequence_length: int
) -> torch.Tensor:
    """The windows of one forward pass: a pure function of its arguments.

    The array is cut into windows that overlap in one token, so that every token is predicted
    once in an epoch. Each epoch has its own order and its own start, both hashed from the seed.

    Args:
        tokens: One-dimensional array of at least two windows.
        batch: Ordinal of the forward pass over the whole run, from 0.
        seed: Seed of the run.
        batch_size: Windows per batch.
        sequence_length: Tokens that a window predicts.

    Returns:
        int64, `[batch_size, sequence_length + 1]`: inputs are all but the last column, targets all
        but the first.
    """
    windows = _windows_per_epoch(len(tokens), sequence_length)
    starts = []
    for sample in range(batch * batch_size, (batch + 1) * batch_size):
        epoch, position = divmod(sample, windows)
        offset, order = _epoch_order(seed, epoch, windows, sequence_length)
        starts.append(offset + int(order[position]) * sequence_length)
    return _windows(tokens, starts, sequence_length)


def validation_windows(tokens: TokenArray, count: int, sequence_length: int) -> list[int]:
    """Starts of at most `count` windows, spread evenly; no two predict the same token."""
    available = (len(tokens) - 1) // sequence_length
    count = min(count, available)
    return [(index * available) // count * sequence_length for index in range(count)]


def read_windows(tokens: TokenArray, starts: Sequence[int], sequence_length: int) -> torch.Tensor:
    """Windows of `sequence_length + 1` tokens as an int64 tensor `[len(starts), ...]`."""
    return _windows(tokens, starts, sequence_length)


def _windows(tokens: TokenArray, starts: Sequence[int], length: int) -> torch.Tensor:
    rows = np.stack([tokens[start : start + length + 1] for start in starts])
    return torch.from_numpy(rows.astype(np.int64))


def _windows_per_epoch(length: int, sequence_length: int) -> int:
    # One window fewer than would fit leaves room for every start below sequence_length.
    return (length - 1) // sequence_length - 1


@lru_cache(maxsize=4)
def _epoch_order(
    seed: int, epoch: int, windows: int, sequence_length: int
) -> tuple[int, npt.NDArray[np.intp]]:
    """First token and order of the windows of an epoch.

    Hashing with SplitMix64 and a stable sort, rather than a library's shuffle, keeps the order
    the same in every version of NumPy.
    """
    epoch_seed = splitmix64(splitmix64(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
    offset = int(splitmix64(epoch_seed)[0] % np.uint64(sequence_length))
    keys = splitmix64(np.add(epoch_seed, np.arange(windows, dtype=np.uint64)))
    return offset, np.argsort(keys, kind="stable")


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) for each state in `values`."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
