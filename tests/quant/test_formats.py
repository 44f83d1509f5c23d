"""Packing, bfloat16 rounding and the dynamic maps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradpress.ops import dynamic, runtime
from gradpress.ops import quant as kernels


def test_every_byte_survives_packing():
    packed = torch.arange(256, dtype=torch.uint8)
    codes = kernels.unpack_int4(packed, 512)
    assert torch.equal(codes[0::2], packed & 15)
    assert torch.equal(codes[1::2], packed >> 4)
    assert torch.equal(kernels.pack_int4(codes), packed)


@given(st.lists(st.integers(0, 15), max_size=70))
def test_odd_counts_pack(values):
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = kernels.pack_int4(codes)
    assert packed.shape == ((len(values) + 1) // 2,)
    assert torch.equal(kernels.unpack_int4(packed, len(values)), codes)


def test_bfloat16_rounding_keeps_the_mean():
    x = torch.full((1 << 18,), 1.0) + torch.rand(1 << 18) / 128
    low = (x.view(torch.int32) & -65536).view(torch.float32)
    result = kernels.round_bf16_stochastic(x, seed=3).float()
    step = 2.0**-7
    assert ((result == low) | (result == low + step)).all()
    # Four standard deviations of the mean of as many roundings, each of at most half a step.
    assert abs(float((result - x).double().mean())) <= 4 * step / 2 / 512


def test_bfloat16_special_values():
    top = torch.finfo(torch.float32).max
    exact = [0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf")]
    x = torch.tensor([*exact, float("nan"), top, -top, 1e-45])
    for seed in range(30):
        y = kernels.round_bf16_stochastic(x, seed=seed).float()
        assert torch.equal(y[:6], x[:6])
        assert torch.isnan(y[6])
        assert torch.isfinite(y[7:]).all()


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    values = dynamic.dequantize_dynamic(
        torch.arange(256, dtype=torch.uint8), torch.ones(1), signed=signed
    )
    assert torch.equal(values, functional.create_dynamic_map(signed=signed))


def test_dynamic_map_facts():
    codes = torch.arange(256, dtype=torch.uint8)
    signed = dynamic.dequantize_dynamic(codes, torch.ones(1), signed=True).double()
    unsigned = dynamic.dequantize_dynamic(codes, torch.ones(1), signed=False).double()
    assert signed[127] == 0
    assert unsigned[0] == 0
    assert signed[255] == unsigned[255] == 1
    assert signed[0] == pytest.approx(-0.99296875)
    assert signed[128] == pytest.approx(5.5e-7)
    assert unsigned[1] == pytest.approx(3.25e-7)
    assert unsigned[254] == pytest.approx(0.996484375)
    assert (signed.diff() > 0).all()
    assert (unsigned.diff() > 0).all()


@given(
    count=st.sampled_from([0, 1, 255, 256, 257]) | st.integers(1, 900),
    signed=st.booleans(),
    exponent=st.integers(-25, 25),
    spread=st.floats(0, 6),
)
def test_dynamic_codes_are_nearest(count, signed, exponent, spread):
    rng = np.random.default_rng(count)
    x = (rng.standard_normal(count) * 10.0 ** (exponent - spread * rng.random(count))).astype("f4")
    x = x if signed else np.abs(x)
    codes, scale, nonfinite = dynamic.quantize_dynamic(x, signed=signed)
    assert nonfinite == 0
    table = dynamic.dequantize_dynamic(
        np.arange(256, dtype=np.uint8), np.ones(1, "f4"), signed=signed
    ).astype(np.float64)
    for block in range(0, count, 256):
        part, code = x[block : block + 256].astype(np.float64), codes[block : block + 256]
        top = np.abs(part).max()
        assert scale[block // 256] == top
        y = part / top
        best = np.abs(y[:, None] - table[None]).min(axis=1)
        ours = np.abs(y - table[code])
        positive = (y > 0) & (code == 1) if not signed else np.zeros(len(y), bool)
        # The quotient is rounded to 2^-24 twice; a second moment may not become zero.
        assert (positive | (ours <= best + 2e-7 * np.abs(y) + 1e-30)).all()
        if not signed:
            assert (code[y > 0] > 0).all()


def test_dynamic_blocks_are_independent():
    x = torch.randn(1024)
    poisoned = x.clone()
    poisoned[300:302] = torch.tensor([float("nan"), float("inf")])
    clean, hit = dynamic.quantize_dynamic(x), dynamic.quantize_dynamic(poisoned)
    assert hit[2] == 2
    keep = torch.arange(1024) // 256 != 1
    assert torch.equal(clean[0][keep], hit[0][keep])
    assert torch.isfinite(hit[1]).all()
    assert (dynamic.quantize_dynamic(torch.zeros(300))[0] == 127).all()


# The signed map of the dynamic data type with three exponent bits, and sixteenths without zero.
FOUR_SIGNED = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0]
FOUR_SIGNED += [-value for value in FOUR_SIGNED[6::-1]] + [1.0]
FOUR_BITS = {True: np.array(FOUR_SIGNED), False: np.arange(1, 17) / 16}


@given(
    count=st.sampled_from([0, 1, 2, 127, 128, 129]) | st.integers(1, 900),
    signed=st.booleans(),
    exponent=st.integers(-25, 25),
    block_size=st.sampled_from([None, 2, 64, 1000]),
)
def test_four_bit_codes_are_nearest(count, signed, exponent, block_size):
    rng = np.random.default_rng(count)
    x = (rng.standard_normal(count) * 10.0**exponent).astype("f4")
    x = x if signed else np.abs(x)
    layout = {"signed": signed, "bits": 4, "block_size": block_size}
    packed, scale, nonfinite = dynamic.quantize_dynamic(x, **layout)
    assert nonfinite == 0
    assert packed.shape == ((count + 1) // 2,)
    back = dynamic.dequantize_dynamic(packed, scale, **layout, shape=(count,))
    size = block_size or 128
    assert scale.shape == (-(-count // size),)
    for block in range(0, count, size):
        part = x[block : block + size].astype(np.float64)
        top = np.abs(part).max()
        assert scale[block // size] == top
        best = np.abs(part[:, None] / top - FOUR_BITS[signed]).min(axis=1)
        ours = np.abs(part - back[block : block + size]) / top
        # Quotient, entry and product are rounded to 2^-24 of at most one each.
        assert (ours <= best + 3e-7).all()


def test_four_bit_blocks_that_are_zero_or_poisoned():
    for signed in (True, False):
        codes, scale, _ = dynamic.quantize_dynamic(torch.zeros(300), signed=signed, bits=4)
        assert not dynamic.dequantize_dynamic(codes, scale, signed=signed, bits=4).any()
    x = torch.rand(512)
    poisoned = x.clone()
    poisoned[200:202] = torch.tensor([float("nan"), float("inf")])
    clean, hit = (dynamic.quantize_dynamic(t, bits=4) for t in (x, poisoned))
    assert hit[2] == 2
    keep = torch.arange(256) // 64 != 1
    assert torch.equal(clean[0][keep], hit[0][keep])
    assert torch.isfinite(hit[1]).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_have_the_same_bits_everywhere(bits, signed, restore_level, restore_threads):
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0)) ** 5
    x = x if signed else x.square()
    results = []
    for level in runtime.simd_levels():
        for threads in (1, 2, 4):
            runtime.set_simd_level(level)
            torch.set_num_threads(threads)
            codes, scale, _ = dynamic.quantize_dynamic(x, signed=signed, bits=bits)
            back = dynamic.dequantize_dynamic(codes, scale, signed=signed, bits=bits)
            results.append((codes, scale, back))
    assert len(results) >= 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be 4 or 8, got 5"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"bits": 4, "block_size": 33}, "block_size must be even for 4 bits, got 33"),
    ],
)
def test_dynamic_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"quantize_dynamic: {message}"):
        dynamic.quantize_dynamic(torch.ones(40), **options)
