"""Devices that the parity tests compare with the CPU: the emulator, and CUDA where there is one."""

import math
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
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value
    return value


def moved(value: Any, device: str) -> Any:
    """A copy on the device, of tensors in lists too."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    if isinstance(value, tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


class Parity:
    """Runs an op on the CPU and on a device, and compares results and arguments."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, op: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Compares every bit; returns what the op gives on the CPU, and leaves the arguments."""
        want, runs = self.runs(op, *args, **options)
        for where, got in runs:
            compare(got, want, where)
        return want[0]

    def runs(self, op: Callable[..., Any], *args: Any, **options: Any) -> tuple[list[Any], Any]:
        """The result and the arguments afterwards: on the CPU, and for each run on the device.

        Everything is on the CPU. Where there are several runs, all of them gave the same bits.
        """
        want = self._run(op, "cpu", args, options)
        runs: list[tuple[str, list[Any]]] = []
        if self.device != "emulator":
            twice = [self._run(op, self.device, args, options) for _ in range(2)]
            compare(twice[1], twice[0], "a second run")
            return want, [(self.device, twice[0])]
        for order in ORDERS:
            with emulator(order, seed=order) as used:
                got = self._run(op, "cpu", args, options)
            empty = all(x.numel() == 0 for x in tensors(args))
            assert used or empty, "no kernel was launched"
            if runs:
                compare(got, runs[0][1], f"order {order} beside order {ORDERS[0]}")
            runs.append((f"order {order}", got))
        return want, runs

    @staticmethod
    def _run(op: Callable[..., Any], device: str, args: Any, options: Any) -> list[Any]:
        args = [moved(arg, device) for arg in args]
        options = {name: moved(option, device) for name, option in options.items()}
        return moved([op(*args, **options), *args, *options.values()], "cpu")


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
