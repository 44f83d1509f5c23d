"""Block-wise quantization against a float64 transcription, and the laws it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import quant as reference

import gradpress
from gradpress.ops import quant as kernels
from gradpress.ops import runtime

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The kernel rounds the scale, its inverse and their product with the value, each to 2^-24, and
# values within 2^-21 of the grid count as on it: codes may differ where the float64 value lies
# this close, in steps, to a decision boundary.
NOISE = 3e-4


def codes_of(q):
    """Codes as numbers, unpacked."""
    count = int(np.prod(q.shape))
    if q.bits == 8:
        return np.asarray(q.codes).astype(np.int64).ravel()
    codes = np.asarray(kernels.unpack_int4(q.codes, count)).astype(np.int64)
    return codes - 8 if q.symmetric else codes


@given(
    count=st.sampled_from([0, 1, 2, 31, 255, 256, 257, 1000, 4097]) | st.integers(1, 3000),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    stochastic=st.booleans(),
    group_size=st.sampled_from([1, 7, 32, 33, 128, 256, 5461]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**64 - 1),
)
def test_matches_float64(count, bits, symmetric, stochastic, group_size, dtype, exponent, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    scale = 1.0 if dtype == torch.float16 else 10.0**exponent
    x = (torch.randn(count, generator=generator) * scale).to(dtype)
    rounding = "stochastic" if stochastic else "nearest"
    q = gradpress.quant.quantize(x, bits, group_size, symmetric, rounding, seed)
    dither = reference.dithers(count, seed) if stochastic else None
    codes, scales, zeros, margin = reference.quantize(
        x.double().numpy(), bits, group_size, symmetric, dither
    )
    np.testing.assert_allclose(q.scale.numpy(), scales, rtol=1e-6)
    if not symmetric:
        # A zero point moves by one where its own rounding is a tie within float32.
        same = q.zero_point.numpy() == zeros
        assert (np.abs(q.zero_point.numpy().astype(int) - zeros) <= 1).all()
        clear = np.repeat(same, group_size)[:count] & (margin > NOISE)
    else:
        clear = margin > NOISE
    assert (codes_of(q)[clear] == codes[clear]).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 3e38])
def test_error_is_within_a_step(bits, symmetric, rounding, scale):
    x = (torch.rand(3001, generator=torch.Generator().manual_seed(1)) - 0.5) * scale
    q = gradpress.quant.quantize(x, bits, 128, symmetric, rounding)
    step = q.scale.repeat_interleave(128)[:3001].double()
    error = (q.dequantize().double() - x.double()).abs() / step
    # Both the zero point and the value may be half a step off at the clamped ends.
    assert error.max() <= 1 + 1e-4
    if rounding == "nearest":
        assert (error > 0.5 + 1e-4).double().mean() <= 2 / 128


@pytest.mark.parametrize(("bits", "expected", "slack"), [(4, 0.109, 0.005), (8, 0.0064, 0.0003)])
def test_gaussian_reconstruction(bits, expected, slack):
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    q = gradpress.quant.quantize(x, bits, 256, rounding="nearest")
    assert abs(float((q.dequantize() - x).norm() / x.norm()) - expected) <= slack


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 1e-38, -3e38, 1.5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_groups(value, bits, symmetric):
    x = torch.full((300,), value)
    back = gradpress.quant.quantize(x, bits, symmetric=symmetric).dequantize()
    # Subnormal steps are coarser than float32's relative precision.
    assert torch.allclose(back, x, rtol=1e-6, atol=1.2e-38)


def test_one_signed_groups_are_not_saturated():
    x = torch.rand(256) + 1
    q = gradpress.quant.quantize(x, rounding="nearest")
    assert (q.dequantize() - x).abs().max() <= q.scale.max() / 2 * 1.001


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_on_the_grid_stay(bits, symmetric):
    generator = torch.Generator().manual_seed(3)
    low, high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (-5, 2**bits - 6)
    steps = torch.randint(low, high + 1, (64, 256), generator=generator)
    steps[:, 0], steps[:, 1] = low, high
    x = steps * (torch.rand(64, 1, generator=generator) + 0.1) * 1e-3
    for seed in range(20):
        q = gradpress.quant.quantize(x, bits, 256, symmetric, seed=seed)
        codes = codes_of(q).reshape(64, 256)
        assert (codes == steps.numpy() - (0 if symmetric else low)).all()
        again = gradpress.quant.quantize(q.dequantize(), bits, 256, symmetric, seed=seed + 100)
        assert torch.equal(again.codes, q.codes)


def test_stochastic_rounding_is_unbiased():
    fractions = torch.linspace(0, 1, 33)[:-1]
    x = torch.zeros(32, 256)
    x[:, 0] = 255.0
    x[:, 1:] = 100 + fractions[:, None]
    draws = [
        gradpress.quant.quantize(x, 8, 256, seed=s).codes[:, 1:].double() - 100 for s in range(64)
    ]
    sample = torch.stack(draws)
    n = sample.numel() // 32
    mean, f = sample.mean(dim=(0, 2)), fractions.double()
    spread = torch.sqrt(f * (1 - f) / n)
    assert (mean[f == 0] == 0).all()
    # Four standard deviations, and the resolution of the dithers.
    assert ((mean - f).abs() <= 4 * spread + 2 / 65536).all()
    variance = sample.var(dim=(0, 2))
    assert torch.allclose(variance, f * (1 - f), atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [256, 33])
def test_same_bits_for_all_threads_and_levels(
    dtype, bits, group_size, restore_threads, restore_level
):
    x = torch.randn(301, 777, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for level in runtime.simd_levels():
        runtime.set_simd_level(level)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            q = gradpress.quant.quantize(x, bits, group_size, seed=5)
            results.append((q.codes, q.scale, q.zero_point, q.dequantize()))
    assert len(results) >= 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_numpy_and_torch_agree_and_seeds_differ():
    x = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    ours, theirs = gradpress.quant.quantize(x, 4), gradpress.quant.quantize(torch.from_numpy(x), 4)
    assert isinstance(ours.codes, np.ndarray)
    np.testing.assert_array_equal(ours.codes, theirs.codes.numpy())
    np.testing.assert_array_equal(ours.dequantize(), theirs.dequantize().numpy())
    assert (gradpress.quant.quantize(x, 4, seed=1).codes != ours.codes).any()


def test_not_contiguous_inputs():
    x = torch.randn(64, 48)
    q = gradpress.quant.quantize(x.t(), rounding="nearest")
    assert torch.equal(q.codes, gradpress.quant.quantize(x.t().clone(), rounding="nearest").codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_values(bad):
    x = torch.randn(1024)
    poisoned = x.clone()
    poisoned[300] = bad
    with pytest.raises(ValueError, match="quantize: x must be finite, got 1 NaN or infinite"):
        gradpress.quant.quantize(poisoned)
    clean, hit = kernels.quantize_blockwise(x, seed=2), kernels.quantize_blockwise(poisoned, seed=2)
    assert hit.nonfinite == 1
    keep = torch.arange(1024) // 256 != 1
    assert torch.equal(clean.codes[keep], hit.codes[keep])
    assert torch.isfinite(hit.scale).all()


def test_bytes_and_repr():
    q = gradpress.quant.quantize(torch.randn(10, 100), bits=4, group_size=64)
    assert q.nbytes == 500 + 16 * 5
    assert "4-bit affine" in repr(q)
    assert "[10, 100]" in repr(q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"rounding": "up"}, 'rounding must be "stochastic" or "nearest"'),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        gradpress.quant.quantize(torch.ones(4), **options)
