"""Arithmetic and conversions of the emulator, bit by bit."""

import numpy as np
import pytest
import torch
from tests.emulator.build import EmulatedModule
from tests.emulator.conftest import FIXTURES

HALVES = {
    "f16": (torch.float16, {}),
    "bf16": (torch.bfloat16, {"WIDEN": "bf16_to_f32", "NARROW": "f32_to_bf16"}),
}


@pytest.fixture(scope="module", params=HALVES)
def half(request):
    dtype, defines = HALVES[request.param]
    return dtype, EmulatedModule(FIXTURES / "convert.cu", defines)


@pytest.fixture(scope="module")
def convert():
    return EmulatedModule(FIXTURES / "convert.cu")


def floats(count, seed=0):
    """Any bit pattern, ordinary numbers, and the awkward ones."""
    rng = np.random.default_rng(seed)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 0.5, 1.5, 2.5, -0.5, 2.0**31, -(2.0**31)]
    special += [2.0**32, 2.0**63, 65504, 65519.996, 65520, 2.0**-24, 2.0**-25, 3 * 2.0**-25]
    patterns = rng.integers(0, 2**32, count).astype(np.uint32).view(np.float32)
    ordinary = rng.standard_normal(count) * 10.0 ** rng.integers(-8, 9, count)
    return np.concatenate([np.float32(special), patterns, np.float32(ordinary)])


def launch(module, name, *arrays, count):
    module.launch(name, (count + 255) // 256, 256, [*arrays, count])


def test_widening_every_half(half):
    dtype, module = half
    bits = np.arange(65536).astype(np.uint16)
    out = np.zeros(65536, np.float32)
    launch(module, "widen", bits, out, count=65536)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(out.view(np.uint32)[number], expected.view(np.uint32)[number])

    back = np.zeros(65536, np.uint16)
    launch(module, "narrow", out, back, count=65536)
    np.testing.assert_array_equal(back, np.where(number, bits, 0x7FFF))


def test_narrowing(half):
    dtype, module = half
    # Also every tie between two neighbours, and the numbers next to it.
    bits = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80).to(torch.int16)
    low = bits.view(dtype).float().numpy()
    tie = ((low[:-1].astype(np.float64) + low[1:]) / 2).astype(np.float32)
    near = [np.nextafter(tie, np.float32(side)) for side in (-np.inf, np.inf)]
    with np.errstate(over="ignore"):
        x = np.concatenate([floats(200_000), tie, *near, -tie])
    out = np.zeros(x.size, np.uint16)
    launch(module, "narrow", x, out, count=x.size)
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(out, np.where(np.isnan(x), 0x7FFF, expected))


def test_float_to_integer(convert):
    x = floats(20_000)
    out = np.zeros((x.size, 8), np.int32)
    launch(convert, "round_float", x, out, count=x.size)
    wide = np.where(np.isnan(x), 0, x).astype(np.float64)
    for column, rounding in enumerate([np.rint, np.floor, np.ceil, np.trunc]):
        expected = np.clip(rounding(wide), -(2**31), 2**31 - 1)
        np.testing.assert_array_equal(out[:, column], expected)
    np.testing.assert_array_equal(out[:, 4].view(np.uint32), np.clip(np.rint(wide), 0, 2**32 - 1))
    np.testing.assert_array_equal(out[:, 5].view(np.float32), out[:, 0].astype(np.float32))
    inside = np.abs(wide) < 2**63
    high = np.where(wide > 0, 2**31 - 1, -(2**31))
    high[inside] = np.rint(wide[inside]).astype(np.int64) >> 32
    high[np.isnan(x)] = -(2**31)
    np.testing.assert_array_equal(out[:, 6], high)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out[:, 7].view(np.float32), np.float32(1) / x)


def test_float_arithmetic(convert):
    x, y = floats(20_000, 1), np.roll(floats(20_000, 2), 3)
    y[:2] = -x[:2]  # zeros of both signs against each other
    out = np.zeros((x.size, 8), np.float32)
    launch(convert, "float_bits", x, y, out, count=x.size)
    with np.errstate(all="ignore"):
        expected = [x + y, x - y, x * y, x / y, np.sqrt(x), np.fmax(x, y), np.fmin(x, y), x * y + x]
    expected = np.stack(expected, 1)
    expected[:2, 5:7] = [0.0, -0.0]
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(out.view(np.uint32)[number], expected.view(np.uint32)[number])


def test_integer_arithmetic(convert):
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 2**32, (2, 1000)).astype(np.uint32)
    x[:4] = [0, 1, 2**31, 2**32 - 1]
    out = np.zeros((x.size, 12), np.uint32)
    launch(convert, "integer_bits", x, y, out, count=x.size)

    def expected(a, b):
        signed = [v - 2**32 if v >= 2**31 else v for v in (a, b)]
        text, both = f"{a:032b}", b << 32 | a
        shuffled = sum((both >> 8 * (3 + i) & 255) << 8 * i for i in range(4))
        yield from (a * b >> 32, signed[0] * signed[1] >> 32, a.bit_count(), 32 - a.bit_length())
        yield from ((a & -a).bit_length(), int(text[::-1], 2), shuffled)
        yield from ((both << 9) >> 32, both >> 9, min(a, b), max(signed), a * b)

    table = [[v % 2**32 for v in expected(int(a), int(b))] for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(out, table)


def test_vector_types(convert):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = np.zeros((3, 4), np.int32)
    launch(convert, "vectors", x, out, count=3)
    np.testing.assert_array_equal(out[:, 0], x[:, 0] + x[:, 1])
    np.testing.assert_array_equal(out[:, 1], x[:, 2] + x[:, 3])
    np.testing.assert_array_equal(out[:, 2:], [[7, 9]] * 3)
