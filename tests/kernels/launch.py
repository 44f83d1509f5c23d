"""What the launcher does, on the emulator: modules, grids, structures (kernels/README.md)."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from tests.emulator.build import EmulatedModule, build

KERNELS = Path(__file__).parents[2] / "kernels"
INCLUDE = [KERNELS / "include"]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CAPACITY = 24
# Options of a launch: threads run in any order, and so do blocks.
ORDERS = (
    {"order": "forward"},
    {"order": "reverse"},
    {"order": "random", "seed": 1, "shuffle_blocks": True},
)
# Parameters and gradients that are run; all nine pairs are compiled for devices.
PAIRS = (("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("bf16", "f32"), ("f32", "bf16"))

MODULES: tuple[tuple[str, dict[str, str]], ...] = (
    *(("quant.cu", {"ELEM": name}) for name in DTYPES),
    *(("dynamic.cu", {"ELEM": name}) for name in DTYPES),
    *(("optim.cu", {"PARAM": p, "GRAD": g}) for p in DTYPES for g in DTYPES),
    ("direction.cu", {}),
    ("update.cu", {}),
)
EMULATED = [m for m in MODULES if "PARAM" not in m[1] or tuple(m[1].values()) in PAIRS]
# The default list would not fit the stack of an emulated thread.
_LIST = {"LIST_CAPACITY": str(CAPACITY)}


def build_one(module: tuple[str, dict[str, str]]) -> None:
    """Compiles a module for the emulator, unless that is done."""
    build(KERNELS / module[0], {**module[1], **_LIST}, INCLUDE)


@functools.cache
def module(file: str, **defines: str) -> EmulatedModule:
    """A module for the emulator."""
    return EmulatedModule(KERNELS / file, {**defines, **_LIST}, INCLUDE)


class Key(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_uint32 * 2),
        ("tensor_id", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
    )


class AdamNumbers(ctypes.Structure):
    _fields_ = (
        ("step", ctypes.c_uint32),
        *((name, ctypes.c_float) for name in ("step_size", "root", "keep")),
    )


class AdamCount(ctypes.Union):
    _fields_ = (("numbers", AdamNumbers), ("counter", ctypes.c_void_p))


class AdamTensor(ctypes.Structure):
    _anonymous_ = ("count",)
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
        *((name, ctypes.c_void_p) for name in ("exp_avg_scale", "exp_avg_sq_scale")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("first_block", "tensor_id")),
        ("count", AdamCount),
    )


class AdamList(ctypes.Structure):
    _fields_ = (("tensors", AdamTensor * CAPACITY),)


class Friction(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint32),
        *((name, ctypes.c_float) for name in ("slope", "height", "base")),
    )


class AdamRates(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "weight_decay")),
        ("lr_at", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("counted", "unused")),
    )


class AdamShared(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "rest1", "rest2", "eps", "factor")),
        ("key", ctypes.c_uint32 * 2),
        ("stochastic", ctypes.c_int32),
        ("friction", Friction),
        ("narrow", ctypes.c_int32),
        ("rates", AdamRates),
    )


class WeightTensor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero_point", "update")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("first_block", "tensor_id", "step")),
        *((name, ctypes.c_float) for name in ("keep", "alpha")),
        ("unused", ctypes.c_uint32),
    )


class WeightList(ctypes.Structure):
    _fields_ = (("tensors", WeightTensor * CAPACITY),)


def key_words(seed: int, stream: int) -> tuple[int, int]:
    """The words of `rng::Key`; stream 0 is quantization, 1 bfloat16."""
    mixed = seed ^ (stream * 0x9E37_79B9_7F4A_7C15) & 0xFFFF_FFFF_FFFF_FFFF
    return mixed & 0xFFFF_FFFF, mixed >> 32


def key(seed: int, stream: int, tensor_id: int, step: int) -> Key:
    return Key((ctypes.c_uint32 * 2)(*key_words(seed, stream)), tensor_id, step)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def is_plain(size: int) -> bool:
    return size in (32, 64, 128) or (size % 256 == 0 and size <= 2048)


class Shape:
    """Grid and block of the kernels that share groups: the plain ones or, if any, teams."""

    def __init__(self, size: int, bits: int, any_size: bool | None = None) -> None:
        self.any = not is_plain(size) if any_size is None else any_size
        if self.any:
            run = size * (2 if bits == 4 and size % 2 else 1)
            self.team = 256 if run > 512 else min(max(1 << (run - 1).bit_length(), 2), 32)
            self.block, self.per_block = 256, (256 // self.team) * run
        else:
            k = max(size // 256, 1)
            warps = 8 // k * k
            self.block, self.per_block = 32 * warps, 256 * warps

    @property
    def suffix(self) -> str:
        return "_any" if self.any else ""

    @property
    def extra(self) -> tuple[int, ...]:
        return (self.team,) if self.any else ()

    def blocks(self, numel: int) -> int:
        return ceil(numel, self.per_block)


class Guarded:
    """Outputs, each in a buffer that must stay as it was before and behind it."""

    MARGIN = 64

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, int]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """A tensor of 0xA5 bytes, `offset` elements away from an aligned address."""
        numel = torch.Size(shape).numel()
        size = torch.empty(0, dtype=dtype).element_size()
        begin = self.MARGIN + offset * size
        buffer = torch.full((begin + numel * size + self.MARGIN,), 0xA5, dtype=torch.uint8)
        self._buffers.append((buffer, begin))
        self._buffers[-1] += (begin + numel * size,)
        return buffer[begin : begin + numel * size].view(dtype).view(shape)

    def copy(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        return self.empty(x.shape, x.dtype, offset).copy_(x)

    def check(self) -> None:
        for buffer, begin, end in self._buffers:
            assert bool((buffer[:begin] == 0xA5).all()), "written before the beginning"
            assert bool((buffer[end:] == 0xA5).all()), "written behind the end"


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal byte for byte."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def counter() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64)
