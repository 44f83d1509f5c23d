"""Byte-level BPE, trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpress.train.errors import UserError, require
from gradpress.train.files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, over bytes).

    Every string is representable: the alphabet holds all 256 bytes. Token 0 ends a document.

    Args:
        texts: Training text.
        vocab_size: Largest vocabulary, at least 257; little text gives fewer tokens.

    Returns:
        The tokenizer.

    Raises:
        UserError: `tokenizers` is not installed.
    """
    tokenizers = require("tokenizers")
    tokenizer: Tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes the tokenizer as one JSON file, all or nothing."""
    write_atomically(path, tokenizer.to_str().encode())


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer that `save_tokenizer` wrote.

    Raises:
        UserError: The file is missing or damaged, or `tokenizers` is not installed.
    """
    tokenizers = require("tokenizers")
    try:
        tokenizer: Tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a bare Exception on malformed input
        raise UserError(f"{path}: cannot be read as a tokenizer ({error})") from error
    return tokenizer


def as_transformers(path: Path) -> Any:
    """The tokenizer as transformers knows it, for an exported model's folder.

    Raises:
        UserError: `transformers` is not installed.
    """
    transformers = require("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
