"""Running training steps on the meta device as on another one: everything but the values."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint as checkpoint

from gradpress.memory._accountant import Accountant
from gradpress.memory._pretence import Pretence
from gradpress.memory._repeats import remembered
from gradpress.memory._tensors import tensors_in

_LOCK = threading.RLock()


class _NoStream:
    """A stream or an event on which nothing ever runs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes what streams and events take."""

    def record(self, *_: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing was waited for."""


class _Core:
    """The native core, of which kernels that get tensors on the meta device do nothing."""

    def __init__(self, core: ModuleType) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._core, name)
        if not callable(value):
            return value

        def kernel(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                absent = any(t.is_meta for t in tensors_in(args, kwargs.values()))
            return None if absent else value(*args, **kwargs)

        return kernel


@contextlib.contextmanager
def simulated(device: torch.device, accountant: Accountant) -> Iterator[None]:
    """Lets tensors on the meta device stand for tensors on `device`.

    The package's functions take them and allocate what they allocate there; the kernels do nothing.
    Functions that get other tensors work as ever. One thread at a time.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        accountant: Counts what is allocated.
    """
    with _LOCK, contextlib.ExitStack() as restored:
        for module in _callers():
            restored.callback(setattr, module, "_core", module._core)
            module._core = _Core(module._core)
        # Checkpoints compare devices, which hooks in the middle of an operator see undisguised.
        checks = checkpoint._allowed_determinism_checks_to_fns
        restored.callback(checks.update, dict(checks))
        checks.update(dict.fromkeys(checks, checks["none"]))
        # They would ask the device for its random state, too.
        restored.callback(setattr, checkpoint, "get_device_states", checkpoint.get_device_states)
        checkpoint.get_device_states = lambda *args: ([], [])
        if device.type == "cuda":
            for name in ("Event", "current_stream"):
                restored.callback(setattr, torch.cuda, name, getattr(torch.cuda, name))
                setattr(torch.cuda, name, _NoStream)
        restored.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")
        restored.enter_context(remembered(accountant))
        with Pretence(device):
            yield


def _callers() -> list[Any]:
    """The modules that call the native core."""
    names = [name for name in sys.modules if name.startswith("gradpress.ops.")]
    return [m for m in map(importlib.import_module, names) if hasattr(m, "_core")]
