"""Every tensor storage that operators make, from the moment it exists to the moment it is freed."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradpress.memory._creations import Creations
from gradpress.memory._tensors import in_order, plain_parts, tensors_in

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Logits(NamedTuple):
    """How logits are recognized: floating-point, of this last dimension and at most these rows."""

    vocabulary: int
    rows: int | None = None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is some."""
        return (
            tensor.ndim > 0
            and tensor.shape[-1] == self.vocabulary
            and tensor.numel() > self.vocabulary
            and tensor.is_floating_point()
            and (self.rows is None or tensor.numel() <= self.rows * self.vocabulary)
        )


class _Storage(weakref.ref[torch.UntypedStorage]):
    """A storage that is live, without keeping it so."""

    __slots__ = ("born", "category", "device", "key", "size")

    key: int
    size: int
    category: str
    born: int
    device: str


class Accountant(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages while it is active, each storage once.

    Operators on tensor subclasses are left to these: what they do inside is seen. So is what the
    operators of this package and composite operators do inside.

    Args:
        meta: Count tensors on the meta device too, as if they had values.
        creations: Keeps what was made.
        logits: Which tensors count as logits.
    """

    def __init__(
        self,
        *,
        meta: bool = False,
        creations: Creations | None = None,
        logits: Logits | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._meta = meta
        self._creations = creations
        self._logits = logits
        self._live: dict[int, _Storage] = {}
        # Filled by finalizers, which may run at any time and in any thread.
        self._freed: deque[weakref.ref[torch.UntypedStorage]] = deque()
        self._births = 0
        self._peak_birth = 0
        self._graph_task = -1
        self._totals: dict[str, int] = {}
        self._at_peak: dict[str, int] = {}
        self._current = 0
        self._peak = 0
        self._current_by_device: dict[str, int] = {}
        self.peak_by_device: dict[str, int] = {}

    # Results

    @property
    def current(self) -> int:
        """Bytes that are live."""
        self._settle()
        return self._current

    @property
    def peak(self) -> int:
        """The most bytes that were live at a time."""
        return self._peak

    @property
    def peak_by_category(self) -> dict[str, int]:
        """What was live at that time."""
        return in_order(self._at_peak)

    @property
    def current_by_category(self) -> dict[str, int]:
        """What is live."""
        self._settle()
        return in_order(self._totals)

    # Parts of what runs

    @contextlib.contextmanager
    def rise(self) -> Iterator[list[int]]:
        """Measures by how many bytes what runs within goes above what is live at its start.

        Yields:
            A list that holds this number at the end.
        """
        self._settle()
        before, start = (self._peak, self._peak_birth, self._at_peak), self._current
        self._set_peak(start)
        found: list[int] = []
        yield found
        found.append(self._peak - start)
        if self._peak <= before[0]:
            self._peak, self._peak_birth, self._at_peak = before

    def repeat(self, rise: int) -> None:
        """Counts what has come and gone like something that was measured before."""
        self._settle()
        if self._current + rise > self._peak:
            self._set_peak(self._current + rise)
            self._at_peak["temporaries"] = self._at_peak.get("temporaries", 0) + rise

    def _set_peak(self, size: int) -> None:
        self._peak, self._peak_birth = size, self._births
        self._at_peak = self._totals.copy()

    # Labels

    def adopt(self, tensor: torch.Tensor, category: str) -> None:
        """Says what a tensor is; one that was not known counts from now on."""
        with torch._C.DisableTorchFunction():
            for part in plain_parts(tensor):
                storage = part.untyped_storage()
                known = self._find(storage)
                if known is not None:
                    self._relabel(known, category)
                elif self._counts(part):
                    self._add(storage, category, part.device)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a plain tensor is counted."""
        return self._find(tensor.untyped_storage()) is not None

    def _relabel(self, storage: _Storage, category: str) -> None:
        if storage.category == category:
            return
        # What is live and is older than the peak was live then.
        sums = [self._totals, self._at_peak] if storage.born <= self._peak_birth else [self._totals]
        for totals in sums:
            totals[storage.category] = totals.get(storage.category, 0) - storage.size
            totals[category] = totals.get(category, 0) + storage.size
        storage.category = category

    def _begin_backward(self) -> None:
        """What exists when a backward pass begins is what forward passes have left for it."""
        self._settle()
        for storage in list(self._live.values()):
            if storage.category == "temporaries":
                self._relabel(storage, "activations")

    # Operators

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operator and counts what it makes."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._graph_task):
            self._begin_backward()
            self._graph_task = task
        key = _inner_key(func, args)
        if key is not None:
            with self:
                return func._op_dk(key, *args, **kwargs)
        result = self._run(func, args, kwargs)
        with torch._C.DisableTorchFunction():
            for tensor in tensors_in((result,)):
                for part in plain_parts(tensor):
                    self._saw(func, part, args, kwargs)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _saw(self, func: Any, tensor: torch.Tensor, args: Any, kwargs: Any) -> None:
        if not self._counts(tensor):
            return
        storage = tensor.untyped_storage()
        known = self._find(storage)
        if known is not None:
            if known.size == storage.nbytes():
                return
            self._remove(known)
        elif _returns_aliases(func) and _is_among(storage, args, kwargs):
            return
        logits = self._logits is not None and self._logits.holds(tensor)
        self._add(storage, "logits" if logits else "temporaries", tensor.device)
        if self._creations is not None:
            self._creations.add(func, tensor, storage.nbytes())

    def _counts(self, tensor: torch.Tensor) -> bool:
        return tensor.layout == torch.strided and (self._meta or not tensor.is_meta)

    # Storages

    def _find(self, storage: torch.UntypedStorage) -> _Storage | None:
        self._settle()
        return self._live.get(storage._cdata)

    def _add(self, storage: torch.UntypedStorage, category: str, device: torch.device) -> None:
        self._births += 1
        entry = _Storage(storage, self._freed.append)
        entry.key, entry.size, entry.category = storage._cdata, storage.nbytes(), category
        entry.born, entry.device = self._births, str(device)
        self._live[entry.key] = entry
        self._change(entry, entry.size)
        if self._current > self._peak:
            self._set_peak(self._current)
        here = self._current_by_device[entry.device]
        if here > self.peak_by_device.get(entry.device, 0):
            self.peak_by_device[entry.device] = here

    def _remove(self, entry: _Storage) -> None:
        if self._live.get(entry.key) is entry:
            del self._live[entry.key]
            self._change(entry, -entry.size)

    def _change(self, entry: _Storage, size: int) -> None:
        self._current += size
        self._totals[entry.category] = self._totals.get(entry.category, 0) + size
        by_device = self._current_by_device
        by_device[entry.device] = by_device.get(entry.device, 0) + size

    def _settle(self) -> None:
        """Takes off what was freed."""
        while self._freed:
            entry = self._freed.popleft()
            assert isinstance(entry, _Storage)
            self._remove(entry)


def _inner_key(func: Any, args: tuple[Any, ...]) -> Any:
    """The key under which an operator runs others, which are seen then; None for most."""
    if func.namespace == "gradpress":
        kind = next(tensors_in(args)).device.type
        return {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}.get(kind)
    return _COMPOSITE if _is_composite(func) else None


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


@functools.cache
def _returns_aliases(func: Any) -> bool:
    # What is lifted was made out of sight, of values in Python.
    if func is torch.ops.aten.lift_fresh.default:
        return False
    return any(result.alias_info is not None for result in func._schema.returns)


def _is_among(storage: torch.UntypedStorage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(
        not hasattr(t, "__tensor_flatten__")
        and t.layout == torch.strided
        and t.untyped_storage()._cdata == storage._cdata
        for t in tensors_in(args, kwargs.values())
    )
