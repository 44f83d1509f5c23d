"""What crosses the border between Python and the native core, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradpress import _core
from gradpress.ops import lowrank, quant


def outputs(count=8):
    return torch.zeros(count, dtype=torch.uint8), torch.zeros(1), torch.zeros(1, dtype=torch.uint8)


def quantize(x, codes, scale, zero_point):
    counter = np.zeros(1, np.int64)
    _core.quantize_blockwise(x, codes, scale, zero_point, counter, 8, False, 256, 0, 0, 0)
    return counter[0]


class Forward:
    """A producer that is neither PyTorch nor NumPy."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldForward(Forward):
    """A producer from before DLPack 1.0."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()


def fake():
    with FakeTensorMode():
        return torch.ones(8)


@pytest.mark.parametrize("shape", [(8,), (1,), (), (3, 1), (1, 1, 2)])
def test_lazily_negated_views_of_every_shape_are_refused(shape):
    x = torch.complex(torch.ones(shape), torch.ones(shape)).conj().imag
    assert x.is_neg()
    codes, scale, zero_point = outputs(x.numel())
    with pytest.raises(TypeError, match="x must be a tensor, got a lazily negated view"):
        quantize(x, codes.view(shape), scale, zero_point)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(8, dtype=torch.int32), TypeError, "x must have dtype float32.*got int32"),
        (torch.ones(8, dtype=torch.complex64), TypeError, "x must be a tensor, got an element"),
        (torch.ones(8, dtype=torch.float64), TypeError, "x must have dtype float32.*got float64"),
        ([1.0], TypeError, "x must be a tensor, got list"),
        (torch.ones(8, device="meta"), TypeError, "x must be a tensor, got one that PyTorch"),
        (torch.ones(16)[::2], ValueError, r"x must be contiguous, got strides \[2\]"),
        (torch.ones(9), ValueError, r"codes must have shape \[9\], got \[8\]"),
        (
            torch.ones(8).as_subclass(Subclass),
            TypeError,
            "x must be a tensor, got the subclass Subclass",
        ),
        (fake(), TypeError, "x must be a tensor, got the subclass FakeTensor"),
        (
            torch.complex(torch.ones(8), torch.ones(8)).conj().imag,
            TypeError,
            "x must be a tensor, got a lazily negated view",
        ),
    ],
)
def test_refused_inputs_leave_the_outputs_alone(x, error, message):
    codes, scale, zero_point = outputs()
    with pytest.raises(error, match="^quantize_blockwise: " + message):
        quantize(x, codes, scale, zero_point)
    assert not codes.any()
    assert not scale.any()


def test_refused_outputs():
    x = torch.ones(8)
    codes, scale, zero_point = outputs()
    read_only = np.zeros(8, np.uint8)
    read_only.flags.writeable = False
    storage = torch.zeros(64, dtype=torch.uint8)
    shared = storage[:32].view(torch.float32)
    cases = [
        (x, read_only, ValueError, "codes is written and must not be read-only"),
        (x, torch.zeros(16, dtype=torch.uint8)[::2], ValueError, "codes must be contiguous"),
        (x, codes.to(torch.int16), TypeError, "codes must be a tensor, got an element type"),
        (shared, storage[4:12], ValueError, "codes is written and shares memory with x"),
    ]
    for values, target, error, message in cases:
        with pytest.raises(error, match="^quantize_blockwise: " + message):
            quantize(values, target, scale, zero_point)
    both = torch.zeros(8)
    with pytest.raises(ValueError, match=r"outs\[\d\] is written and shares memory"):
        lowrank.project([torch.ones(8, 1)] * 2, [torch.ones(1, 1)] * 2, [both.view(8, 1)] * 2)
    with pytest.raises(ValueError, match="bases must hold 1 tensors, one for each of grads, got 0"):
        lowrank.project([torch.ones(8, 1)], [], [both.view(8, 1)])
    assert not both.any()


@pytest.mark.parametrize("wrap", [Forward, OldForward, lambda x: x, torch.from_numpy])
def test_every_producer_gives_the_same(wrap):
    x = np.linspace(-1, 1, 8, dtype=np.float32)
    codes, scale, zero_point = np.zeros(8, np.uint8), np.zeros(1, "f4"), np.zeros(1, np.uint8)
    quantize(wrap(x), codes, wrap(scale), zero_point)
    want = quant.quantize_blockwise(torch.from_numpy(x), rounding="nearest")
    np.testing.assert_array_equal(codes, want.codes.numpy())
    np.testing.assert_array_equal(scale, want.scale.numpy())


def test_parameters_and_read_only_inputs_are_accepted():
    codes, scale, zero_point = outputs()
    assert quantize(torch.nn.Parameter(torch.ones(8)), codes, scale, zero_point) == 0
    assert (codes == 255).all()
    x = np.ones(8, "f4")
    x.flags.writeable = False
    assert quantize(x, *outputs()) == 0


def test_autograd_notices_what_is_written():
    out = torch.zeros(4, 1)
    version = out._version
    lowrank.project([torch.ones(4, 1)], [torch.ones(1, 1)], [out])
    assert out._version > version


def test_levels_are_checked(restore_level):
    for level in _core.simd_levels():
        _core.set_simd_level(level)
        assert _core.simd_level() == level
    with pytest.raises(ValueError, match="set_simd_level: level must be one of"):
        _core.set_simd_level("mmx")


def test_every_op_is_tested_and_wrapped():
    root = Path(__file__).parents[2]
    ops = "".join(p.read_text() for p in (root / "python/gradpress/ops").glob("*.py"))
    tests = "".join(p.read_text() for p in (root / "tests").rglob("test_*.py"))
    names = set(_core.__all__) - {"version"}
    assert len(names) > 15
    assert {n for n in names if f"_core.{n}(" not in ops} == set()
    assert {n for n in names if not re.search(rf"\b{n}\b", tests)} == set()
