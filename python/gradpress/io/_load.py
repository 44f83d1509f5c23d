"""Loading what was saved, as a state dict or into a model."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import nn

from gradpress.io._entries import DTYPE_CODES, memory_key
from gradpress.io._header import Header, read_header
from gradpress.io._layout import join, part_names
from gradpress.nn import QuantizedWeight
from gradpress.ops._arrays import dtype_name

_DTYPES = {code: name for name, code in DTYPE_CODES.items()}


class IncompatibleKeys(NamedTuple):
    """Where a file and a model differ.

    Attributes:
        missing_keys: Names that the model has and the file has not; they keep their values.
        unexpected_keys: Names that the file has and the model has not.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


@overload
def load(
    path: str | os.PathLike[str], model: None = None, *, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]: ...
@overload
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    strict: bool = True,
    device: str | torch.device = "cpu",
) -> IncompatibleKeys: ...
def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    strict: bool = True,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor] | IncompatibleKeys:
    """Loads a file of :func:`save`, bit for bit.

    Args:
        path: The file.
        model: Filled in place, one tensor at a time, where given. Names, shapes, dtypes and the
            layouts of quantized weights are compared before anything is touched.
        strict: Whether the model and the file have to hold the same names.
        device: Where tensors are read to and unpacked. A model's tensors stay where they are.

    Returns:
        Without a model the state dict, in its order: dense tensors and
        :class:`gradpress.nn.QuantizedWeight`; names that shared their memory share it again. With a
        model, the names that only one of the two has.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: safetensors is not installed.
        ValueError: the file is damaged, not one of :func:`save`, or of a newer version; or it does
            not fit the model, which is unchanged then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: path is no file: {path}")
    with _opened(path, device) as file:
        if model is None:
            return file.state_dict()
        return _load_into(model, file, strict)


class _File:
    """An open file: what it says of itself, and its tensors one at a time."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path, self._handle = path, handle
        self.stored = list(handle.keys())
        self.header: Header = read_header(handle.metadata(), self.stored)

    def tensor(self, name: str) -> torch.Tensor:
        name = self.header.aliases.get(name, name)
        record = self.header.tensors.get(name)
        if record is None:
            return self._handle.get_tensor(name)  # type: ignore[no-any-return]
        parts = [self._handle.get_tensor(part) for part in part_names(name, record["format"])]
        try:
            return join(record, parts)
        except ValueError as error:
            raise ValueError(f"load: {self.path}: {name} is damaged: {error}") from error

    def state_dict(self) -> dict[str, torch.Tensor]:
        aliases = self.header.aliases
        tensors = {name: self.tensor(name) for name in self.header.order if name not in aliases}
        return {name: tensors[aliases.get(name, name)] for name in self.header.order}

    def describe(self, name: str) -> str:
        """Kind and shape of a tensor, without reading it."""
        name = self.header.aliases.get(name, name)
        record = self.header.tensors.get(name)
        if record is None:
            part = self._handle.get_slice(name)
            return _text(_DTYPES[part.get_dtype()], part.get_shape())
        if not record["format"].startswith("int"):
            return _text(record["dtype"], record["shape"])
        kind = f"{record['dtype']} as {record['format']} in groups of {record['group_size']}"
        return _text(kind, record["shape"])


@contextlib.contextmanager
def _opened(path: Path, device: str | torch.device) -> Iterator[_File]:
    try:
        safetensors: Any = importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            'load: needs safetensors, which is not installed: pip install "gradpress[io]"'
        ) from error
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as handle:
            try:
                file = _File(path, handle)
            except ValueError as error:
                raise ValueError(f"load: {path}: {error}") from error
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is no whole safetensors file: {error}") from error


def _text(kind: str, shape: Any) -> str:
    return f"{kind} of shape {list(shape)}"


def _describe(target: torch.Tensor) -> str:
    kind = dtype_name(target)
    if isinstance(target, QuantizedWeight):
        kind = f"{kind} as int{target.bits} in groups of {target.group_size}"
    return _text(kind, target.shape)


def _load_into(model: nn.Module, file: _File, strict: bool) -> IncompatibleKeys:
    targets = _targets(model)
    names = set(file.header.order)
    filled = {memory_key(targets[name]) for name in targets.keys() & names} - {None}
    # A tied tensor is there when any of its names is.
    missing = [
        name for name in targets if name not in names and memory_key(targets[name]) not in filled
    ]
    unexpected = [name for name in file.header.order if name not in targets]
    problems = _mismatches(targets, file)
    if strict:
        problems = [
            *(f"missing in the file: {name}" for name in missing),
            *(f"unexpected in the file: {name}" for name in unexpected),
            *problems,
        ]
    if problems:
        raise ValueError(f"load: {file.path} does not fit model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name in file.header.order:
            if name in targets:
                targets[name].copy_(file.tensor(name))
    return IncompatibleKeys(missing, unexpected)


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's state themselves.

    Raises:
        ValueError: the state is not made of the model's own parameters and buffers, or some have
            no values.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if id(value) not in own:
            raise ValueError(
                f"load: model makes {name} of its state dict anew, so that it cannot be filled in"
                " place; use model.load_state_dict(gradpress.io.load(path))"
            )
        if value.is_meta:
            raise ValueError(
                f"load: model has {name} on the meta device; give it values first, with"
                " model.to_empty(device=...)"
            )
    return state


def _mismatches(targets: dict[str, torch.Tensor], file: _File) -> list[str]:
    problems = []
    for name in file.header.order:
        if name in targets and (want := _describe(targets[name])) != (got := file.describe(name)):
            problems.append(f"{name} must be {want}, got {got}")
    return [*problems, *_untied(targets, file)]


def _untied(targets: dict[str, torch.Tensor], file: _File) -> list[str]:
    """Tensors that are one in the model and differ in the file."""
    problems = []
    first: dict[Any, str] = {}
    for name in file.header.order:
        key = memory_key(targets[name]) if name in targets else None
        if key is None:
            continue
        other = first.setdefault(key, name)
        aliases = file.header.aliases
        if aliases.get(other, other) != aliases.get(name, name):
            problems.append(f"{name} and {other} are one tensor in the model, two in the file")
    return problems
