"""Gradients of single samples beside float64 ones by autograd, and the laws they keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.prune.golden import GRADIENTS

from gradpress import prune
from gradpress.ops import prune as kernels
from gradpress.prune import _gradients

#: Sums of float32 over the tokens, relative to the largest gradient.
NEAR = 1e-5


def layer(samples, tokens, rows, columns, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, tokens, columns, generator=g).to(dtype)
    return inputs, (torch.randn(samples, tokens, rows, generator=g) * 1e-3).to(dtype)


def gradients(inputs, grad_outputs):
    """Of each sample by itself, in float64."""
    weight = torch.zeros(
        grad_outputs.shape[-1], inputs.shape[-1], dtype=torch.float64, requires_grad=True
    )
    found = []
    for sample, grad in zip(inputs.double(), grad_outputs.double(), strict=True):
        found.append(torch.autograd.grad((sample @ weight.T * grad).sum(), weight)[0])
    return torch.stack(found) if found else torch.zeros(0, *weight.shape, dtype=torch.float64)


def norm_of(grads, norm):
    mean = grads.abs() if norm == "l1" else grads.square()
    mean = mean.sum(0) / max(len(grads), 1)
    return mean if norm == "l1" else mean.sqrt()


@given(
    parts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=4),
    rows=st.sampled_from([0, 1, 5, 33]),
    columns=st.sampled_from([0, 1, 4, 47]),
    norm=st.sampled_from(["l1", "l2"]),
    dtypes=st.sampled_from([(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2])
    | st.just((torch.bfloat16, torch.float32)),
    whole=st.booleans(),
    seed=st.integers(0, 100),
)
def test_matches_autograd(parts, rows, columns, norm, dtypes, whole, seed):
    norms = prune.GradientNorms(rows, columns, norm)
    merged = prune.GradientNorms(rows, columns, norm)
    found = []
    for i, (samples, tokens) in enumerate(parts):
        inputs, grads = layer(samples, tokens, rows, columns, seed=seed + i)
        inputs, grads = inputs.to(dtypes[0]), grads.to(dtypes[1])
        found.append(gradients(inputs, grads))
        other = prune.GradientNorms(rows, columns, norm)
        if whole:
            for one in found[-1].float():
                norms.update(one)
                other.update(one)
        else:
            norms.update_from_activations(inputs, grads)
            other.update_from_activations(inputs, grads)
        merged.merge(other)
    want = torch.cat([torch.zeros(0, rows, columns, dtype=torch.float64), *found])
    assert norms.samples == merged.samples == len(want)
    assert norms.nonfinite == 0
    near = NEAR * float(want.abs().max()) if want.numel() else 0
    for got in (norms, merged):
        assert got.values.dtype == torch.float32
        torch.testing.assert_close(got.values.double(), norm_of(want, norm), rtol=1e-5, atol=near)
    scaled = 100 * want
    reference = scaled.abs().sum(0) if norm == "l1" else scaled.square().sum(0).sqrt()
    near *= 100 * max(len(want), 1)
    torch.testing.assert_close(norms.reference_values().double(), reference, rtol=1e-5, atol=near)


def test_golden():
    for norm, want in (
        ("l1", [[0.3, 0.3, 0.7, 0.15], [0.4, 0.3, 0.7, 2.2]]),
        ("l2", [[0.223607, 0.223607, 0.5, 0.111803], [0.316228, 0.223607, 0.608276, 2.009975]]),
    ):
        norms = prune.GradientNorms(2, 4, norm)
        for gradient in GRADIENTS:
            norms.update(gradient.numpy())
        torch.testing.assert_close(norms.reference_values(), torch.tensor(want), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_repeated_set_changes_only_the_sums_of_the_reference(norm):
    inputs, grads = layer(3, 20, 6, 10)
    once, twice = (prune.GradientNorms(6, 10, norm) for _ in range(2))
    once.update_from_activations(inputs, grads)
    for _ in range(2):
        twice.update_from_activations(inputs, grads)
    torch.testing.assert_close(twice.values, once.values)
    factor = 2 if norm == "l1" else 2**0.5
    torch.testing.assert_close(twice.reference_values(), factor * once.reference_values())


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_not_added_up_before_their_norm(norm, dtype):
    inputs, grads = layer(2, 20, 6, 10, dtype)
    both, each = (prune.GradientNorms(6, 10, norm) for _ in range(2))
    both.update_from_activations(inputs, grads)
    for n in range(2):
        each.update_from_activations(inputs[n : n + 1], grads[n : n + 1])
    assert torch.equal(both.values, each.values)
    one = prune.GradientNorms(6, 10, norm)
    one.update_from_activations(inputs[0], grads[0])  # two dimensions are one sample
    assert one.samples == 1
    opposite = prune.GradientNorms(6, 10, norm)
    opposite.update_from_activations(
        torch.stack([inputs[0], inputs[0]]), torch.stack([grads[0], -grads[0]])
    )
    assert torch.equal(opposite.values, one.values)
    assert float(one.values.min()) > 0
    factor = 2 if norm == "l1" else 2**0.5
    torch.testing.assert_close(opposite.reference_values(), factor * one.reference_values())


def test_zero_gradients():
    for norm in ("l1", "l2"):
        norms = prune.GradientNorms(5, 8, norm)
        norms.update_from_activations(torch.randn(2, 7, 8), torch.zeros(2, 7, 5))
        norms.update(torch.zeros(5, 8))
        norms.update_from_activations(torch.randn(1, 0, 8), torch.zeros(1, 0, 5))
        assert norms.samples == 4
        assert not norms.values.any()
        score = prune.score_gblm(torch.ones(5, 8), torch.ones(8), norms.values, norm=norm)
        assert torch.equal(score, torch.ones(5, 8))


def test_norms_bound_each_other():
    inputs, grads = layer(7, 11, 9, 13)
    sums = {}
    for norm in ("l1", "l2"):
        norms = prune.GradientNorms(9, 13, norm)
        norms.update_from_activations(inputs, grads)
        sums[norm] = norms.reference_values(1.0).double() ** 2
    assert (sums["l2"] <= sums["l1"] * (1 + 1e-5)).all()
    assert (sums["l1"] <= 7 * sums["l2"] * (1 + 1e-5)).all()


def test_scale_undoes_a_mean_over_samples():
    inputs, grads = layer(4, 6, 3, 5)
    for norm in ("l1", "l2"):
        want, got = (prune.GradientNorms(3, 5, norm) for _ in range(2))
        want.update_from_activations(inputs, grads)
        got.update_from_activations(inputs, grads / 4, scale=4.0)
        assert torch.equal(got.values, want.values)  # powers of two


def test_what_is_not_finite_is_left_out_and_counted():
    norms = prune.GradientNorms(2, 3, "l2")
    norms.update(torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 1e30, -3.0]]))
    assert norms.nonfinite == 3  # 1e30 has no square
    assert norms.values.tolist() == [[1, 0, 2], [0, 0, 3]]
    other = prune.GradientNorms(2, 3, "l2")
    other.update_from_activations(torch.full((1, 4, 3), float("nan")), torch.ones(1, 4, 2))
    norms.merge(other)
    assert norms.nonfinite == 9
    assert torch.isfinite(norms.values).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_sum_has_the_size_of_the_weight(dtype, monkeypatch):
    rows = columns = 256
    monkeypatch.setitem(_gradients._TILE_BYTES, "cpu", 0)
    monkeypatch.setattr(_gradients, "_TILE_ROWS", 32)
    monkeypatch.setattr(_gradients, "_TOKENS", 64)
    inputs, grads = layer(2, 300, rows, columns, dtype)
    norms = prune.GradientNorms(rows, columns)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if (
                isinstance(result, torch.Tensor)
                and result.untyped_storage().data_ptr() not in given
            ):
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    with Watch() as watch:
        norms.update_from_activations(inputs, grads)
    assert 0 < watch.largest <= rows * columns * 4 // 4
    want = norm_of(gradients(inputs, grads), "l1")
    torch.testing.assert_close(norms.values.double(), want, rtol=1e-5, atol=1e-7)


@given(
    shape=st.sampled_from([(0, 3), (1, 1), (3, 5), (2, 2049), (9, 9000)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    squared=st.booleans(),
    scale=st.sampled_from([1.0, 100.0, -0.3, 0.0]),
)
def test_accumulation_is_that_of_float32(shape, dtype, squared, scale):
    g = torch.Generator().manual_seed(1)
    total, part = torch.rand(shape, generator=g), torch.randn(shape, generator=g).to(dtype)
    value = np.float32(scale) * part.float().numpy()
    want = total.numpy() + (value * value if squared else np.abs(value))
    got = total.numpy().copy()
    counter = kernels.accumulate_gradients(got, part.float().numpy(), squared, scale)
    assert int(counter[0]) == 0
    np.testing.assert_array_equal(got, want)
    before = total._version
    assert int(kernels.accumulate_gradients(total, part, squared, scale)) == 0
    np.testing.assert_array_equal(total.numpy(), want)
    assert total._version > before


def test_refuses_what_does_not_fit():
    norms = prune.GradientNorms(2, 3)
    with pytest.raises(
        ValueError, match=r"GradientNorms.update: gradient must have shape \[2, 3\]"
    ):
        norms.update(torch.ones(3, 2))
    with pytest.raises(TypeError, match="gradient must have dtype float32"):
        norms.update(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"inputs must be a torch\.Tensor or a numpy"):
        norms.update_from_activations([1.0], torch.ones(1, 2))
    with pytest.raises(
        ValueError, match=r"inputs must be \[samples, tokens, 3\], got shape \[4, 2\]"
    ):
        norms.update_from_activations(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"samples and tokens of inputs, \[1, 4\], got \[1, 5\]"):
        norms.update_from_activations(torch.ones(4, 3), torch.ones(5, 2))
    with pytest.raises(ValueError, match="merge: other must have norm, rows and columns"):
        norms.merge(prune.GradientNorms(2, 3, "l2"))
    with pytest.raises(ValueError, match='norm must be "l1" or "l2"'):
        prune.GradientNorms(2, 3, "l3")
    with pytest.raises(ValueError, match="rows must be at least 0, got -1"):
        prune.GradientNorms(-1, 3)
    assert norms.samples == 0
    total = torch.ones(2, 3)
    for args, error, message in (
        ((total, torch.ones(3, 2)), ValueError, "part must have shape"),
        ((total, total), ValueError, "overlap|memory"),
        ((total.double(), torch.ones(2, 3)), TypeError, "total must"),
        ((total.T, torch.ones(3, 2)), ValueError, "total must be contiguous"),
        ((total, torch.ones(2, 3), False, float("nan")), ValueError, "scale must be finite"),
    ):
        with pytest.raises(error, match=f"accumulate_gradients: .*({message})"):
            kernels.accumulate_gradients(*args)
    assert torch.equal(total, torch.ones(2, 3))
