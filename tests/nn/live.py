"""The bytes of results that are alive, as an allocator sees them."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storage that operations make while this is on: what is alive, and the most of it."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = self._of((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in self._of(out).items():
            known = self._storages.get(key)
            if key not in inputs and (known is None or known[0].expired()):
                self._storages[key] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes that are alive."""
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        return sum(size for _, size in self._storages.values())

    @staticmethod
    def _of(values):
        tensors = (t for t in tree_leaves(values) if isinstance(t, torch.Tensor))
        return {s._cdata: s for s in (t.untyped_storage() for t in tensors)}
