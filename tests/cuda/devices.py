"""Devices that the parity tests compare with the CPU: the emulator, and CUDA where there is one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.emulator.build import SANITIZE_VARIABLE, build

from gradpress.ops import runtime

KERNELS = Path(__file__).parents[2] / "kernels"
#: Fewer than a device takes, so that the lists of the tests are cut into several launches.
LIST_CAPACITY = 3
#: Which thread goes on where several can: forward, reverse, random with blocks in any order.
ORDERS = (0, 1, 2 + 4)
#: Under `python -m tests.emulator.build sanitized python -m pytest tests/cuda`.
SANITIZE = os.environ.get(SANITIZE_VARIABLE, "0") not in ("", "0")


@contextmanager
def emulator(order: int = 0, seed: int = 0) -> Iterator[list[str]]:
    """Ops on CPU tensors take their CUDA half; gives the files whose kernels were launched."""
    used: list[str] = []

    def library(module: str, defines: list[str]) -> str:
        used.append(module)
        macros = dict(define.split("=") for define in defines)
        return str(build(KERNELS / module, macros, [KERNELS / "include"], SANITIZE))

    runtime.set_emulator(library, order=order, seed=seed, list_capacity=LIST_CAPACITY)
    try:
        yield used
    finally:
        runtime.set_emulator(None)


def bits(value: Any) -> Any:
    """What has to be equal: the bytes of tensors, and everything else as it is."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        return str(data.dtype), tuple(data.shape), data.flatten().view(torch.uint8).tolist()
    if isinstance(value, tuple | list):
        return [bits(item) for item in value]
    return value


def moved(value: Any, device: str) -> Any:
    """A copy on the device, of tensors in lists too."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value


class Parity:
    """Runs an op on the CPU and on a device, and compares every bit of results and arguments."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, op: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Returns what the op gives on the CPU; tensors among the arguments stay as they are."""
        want = self._run(op, "cpu", args, options)
        if self.device == "emulator":
            for order in ORDERS:
                with emulator(order, seed=order) as used:
                    got = self._run(op, "cpu", args, options)
                    compare(got, want, f"order {order}")
                empty = all(x.numel() == 0 for x in tensors(args))
                assert used or empty, "no kernel was launched"
        else:
            compare(self._run(op, self.device, args, options), want, self.device)
        return want[0]

    @staticmethod
    def _run(op: Callable[..., Any], device: str, args: Any, options: Any) -> list[Any]:
        args = [moved(arg, device) for arg in args]
        options = {name: moved(option, device) for name, option in options.items()}
        return [op(*args, **options), *args, *options.values()]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor among arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def compare(got: list[Any], want: list[Any], where: str) -> None:
    for i, (one, other) in enumerate(zip(bits(got), bits(want), strict=True)):
        assert one == other, f"{where}: result" if i == 0 else f"{where}: argument {i - 1}"
