"""The fused AdamW steps against float64 and against PyTorch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradpress.ops import dynamic, runtime
from gradpress.ops import optim as kernels

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
FULL = {**HYPER, "weight_decay": 0.1}


def eight_bit(shape):
    blocks = -(-int(np.prod(shape)) // 256)
    return [
        torch.full(shape, 127, dtype=torch.uint8),
        torch.zeros(blocks),
        torch.zeros(shape, dtype=torch.uint8),
        torch.zeros(blocks),
    ]


def reference(p, grads):
    p, m, v = p.double().numpy().copy(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        p = p * (1 - 1e-2 * 0.1) - 1e-2 * update
    return p


@given(
    count=st.sampled_from([0, 1, 255, 257, 1025]) | st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_adamw_step_against_float64(count, dtype, scale):
    g = torch.Generator().manual_seed(count)
    scale = 1.0 if dtype == torch.float16 else scale
    grads = [(torch.randn(count, generator=g) * scale).to(dtype) for _ in range(10)]
    start = torch.randn(count, generator=g)
    p, m, v = start.clone(), torch.zeros(count), torch.zeros(count)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    for t, grad in enumerate(grads, 1):
        kernels.adamw_step(
            [p], [grad], [m], [v], steps=[t], tensor_ids=[0], nonfinite=nonfinite, **FULL
        )
    # Ten steps of 1e-2, float32 rounding in each.
    np.testing.assert_allclose(p.numpy(), reference(start, grads), rtol=1e-5, atol=1e-6)
    assert nonfinite.item() == 0


def test_eight_bit_moments_stay_close_and_directions_agree():
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(5000, generator=g) + 0.5 for _ in range(20)]
    start = torch.randn(5000, generator=g)
    p, states, nonfinite = start.clone(), eight_bit((5000,)), torch.zeros(1, dtype=torch.int64)
    other = eight_bit((5000,))
    q = start.clone()
    for t, grad in enumerate(grads, 1):
        lists = [[s] for s in states]
        kernels.adamw_blockwise_step(
            [p], [grad], *lists, steps=[t], tensor_ids=[0], nonfinite=nonfinite, **FULL
        )
        update = grad.clone()
        kernels.adamw_blockwise_direction(
            [update], *([s] for s in other), steps=[t], nonfinite=nonfinite, **HYPER
        )
        q = q * (1 - 1e-3) + update
    # Moments are off by the map's spacing, 1 to 6 per cent of a step each.
    error = np.abs(p.numpy() - reference(start, grads))
    assert error.mean() < 0.02 * 20 * 1e-2
    torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    update, m, v = grads[0].clone(), torch.zeros(5000), torch.zeros(5000)
    kernels.adamw_direction([update], [m], [v], steps=[1], nonfinite=nonfinite, **HYPER)
    torch.testing.assert_close(update, -1e-2 * grads[0].sign(), rtol=1e-4, atol=1e-7)


def test_the_first_step_is_right_to_float32():
    """One minus a decay rate is rounded once: subtracted in float32 it would be off by 5e-6."""
    grad = torch.tensor([0.3, -2.0, 7.0, -0.11])
    update, m, v = grad.clone(), torch.zeros(4), torch.zeros(4)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    kernels.adamw_direction([update], [m], [v], steps=[1], nonfinite=nonfinite, **HYPER)
    exact = -1e-2 * grad.double() / (grad.double().abs() + 1e-8)
    # A handful of roundings of 6e-8 each.
    torch.testing.assert_close(update.double(), exact, rtol=5e-7, atol=0)
    torch.testing.assert_close(v.double(), 1e-3 * grad.double() ** 2, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_levels_threads_and_lists(dtype, restore_level, restore_threads):
    results = []
    for level in runtime.simd_levels():
        for threads, together in ((1, True), (2, True), (4, False)):
            runtime.set_simd_level(level)
            torch.set_num_threads(threads)
            g = torch.Generator().manual_seed(0)
            shapes = [(301, 333), (7,), (256, 256)]
            params = [torch.randn(s, generator=g).to(dtype) for s in shapes]
            grads = [torch.randn(s, generator=g) for s in shapes]
            states = [list(x) for x in zip(*(eight_bit(s) for s in shapes), strict=True)]
            counter = torch.zeros(1, dtype=torch.int64)
            for t in (1, 2, 3):
                parts = [slice(None)] if together else [slice(i, i + 1) for i in range(3)]
                for part in parts:
                    count = len(params[part])
                    kernels.adamw_blockwise_step(
                        params[part], grads[part], *(s[part] for s in states),
                        steps=[t] * count, tensor_ids=[0, 1, 2][part], nonfinite=counter, **FULL,
                    )  # fmt: skip
            results.append([*params, *(t for s in states for t in s)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nonfinite_elements_are_left_alone():
    g = torch.Generator().manual_seed(0)
    p, grad = torch.randn(600, generator=g), torch.randn(600, generator=g)
    clean, m, v = p.clone(), torch.zeros(600), torch.zeros(600)
    counter = torch.zeros(1, dtype=torch.int64)
    kernels.adamw_step(
        [clean], [grad], [m], [v], steps=[1], tensor_ids=[0], nonfinite=counter, **FULL
    )
    grad[[3, 300]] = torch.tensor([float("nan"), -float("inf")])
    hit, m, v = p.clone(), torch.zeros(600), torch.zeros(600)
    kernels.adamw_step(
        [hit], [grad], [m], [v], steps=[1], tensor_ids=[0], nonfinite=counter, **FULL
    )
    assert counter.item() == 2
    assert torch.equal(hit[[3, 300]], p[[3, 300]])
    assert not m[[3, 300]].any()
    keep = torch.isfinite(grad)
    assert torch.equal(hit[keep], clean[keep])
    huge = torch.full((300,), 3e38)
    states = eight_bit((300,))
    q = torch.zeros(300)
    kernels.adamw_blockwise_step(
        [q], [huge], *([s] for s in states), steps=[1], tensor_ids=[0], nonfinite=counter, **FULL
    )
    assert torch.isfinite(q).all()
    assert torch.isfinite(states[3]).all()


FRICTIONS = {
    "abs": lambda d: 1 / (1 + np.exp(-np.abs(d))),
    "signed": lambda d: 1 / (1 + np.exp(-d)),
    "wide": lambda d: 9 / (1 + np.exp(-np.abs(d) / 2)) - 4,
}


@given(
    count=st.integers(0, 600),
    friction=st.sampled_from(sorted(FRICTIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 20.0, 1e4]),
    bits=st.sampled_from([None, 4, 8]),
)
def test_friction_against_float64(count, friction, dtype, scale, bits):
    g = torch.Generator().manual_seed(count)
    grad, before = (torch.randn(count, generator=g) * scale for _ in range(2))
    before = before.to(dtype)
    results, kept = [], before.clone()
    for options in ({}, {"previous_grads": [kept], "friction": friction}):
        nonfinite, update = torch.zeros(1, dtype=torch.int64), grad.clone()
        common = {"steps": [1], "nonfinite": nonfinite, **HYPER, **options}
        if bits is None:
            kernels.adamw_direction([update], [torch.zeros(count)], [torch.zeros(count)], **common)
        else:
            states = codes_of_zero(count, bits)
            kernels.adamw_blockwise_direction([update], *states, bits=bits, **common)
        results.append(update.double().numpy())
    difference = before.double().numpy() - grad.double().numpy()
    with np.errstate(over="ignore"):
        factor = FRICTIONS[friction](difference)
    # One float32 subtraction (relative to the larger term), one exponential of 2e-7, and a handful
    # of roundings; "wide" takes 4 from up to 9.
    slack = 2e-6 * (1 + np.abs(before.double().numpy()) + np.abs(grad.double().numpy()))
    np.testing.assert_array_less(
        np.abs(results[1] - results[0] * factor), np.abs(results[0]) * slack + 1e-30
    )
    np.testing.assert_array_equal(kept.float().numpy(), grad.to(dtype).float().numpy())


def codes_of_zero(count, bits):
    lists = []
    for signed in (True, False):
        code, scale, _ = dynamic.quantize_dynamic(
            torch.zeros(count), signed=signed, bits=bits, block_size=256
        )
        lists += [[code], [scale]]
    return lists


def test_friction_spares_what_is_not_finite_and_checks_its_arguments():
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([nan, inf, -inf, 1.0])
    before, nonfinite = torch.arange(4.0), torch.zeros(1, dtype=torch.int64)
    m, v = torch.zeros(4), torch.zeros(4)

    def call(**options):
        kernels.adamw_direction(
            [grad], [m], [v], steps=[1], nonfinite=nonfinite, **HYPER, **options
        )

    for message, options in {
        "friction must be abs, signed or wide, got none": {
            "previous_grads": [before],
            "friction": "none",
        },
        "friction must be .*previous_grads is, .*None": {"previous_grads": [before]},
        "friction must be .*previous_grads is, and only": {"friction": "abs"},
        r"previous_grads\[0\].*shape": {"previous_grads": [before[:3]], "friction": "abs"},
        "previous_grads.*1.*2": {"previous_grads": [before, before], "friction": "abs"},
        r"previous_grads\[0\]": {"previous_grads": [before.half()], "friction": "abs"},
        "grads": {"previous_grads": [grad], "friction": "abs"},
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call(**options)
    assert grad.isnan()[0]
    assert torch.equal(before, torch.arange(4.0))
    call(previous_grads=[before], friction="abs")
    assert grad[:3].tolist() == [0.0, 0.0, 0.0]
    assert before.tolist() == [0.0, 1.0, 2.0, 1.0]
    assert nonfinite.item() == 3


POINTS = [1, 2, 3, 1000, 65_535, 100_000, 16_777_216]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counters_and_rates_in_tensors_give_the_bits_of_numbers(dtype):
    lr = torch.tensor(1e-2)
    forms = [
        {"steps": POINTS, "lr": lr.item()},
        {"steps": [torch.tensor(float(n)) for n in POINTS], "lr": lr.item()},
        {"steps": POINTS, "lr": lr},
        {"steps": [torch.tensor([float(n)]) for n in POINTS], "lr": lr.view(1)},
    ]
    results = []
    for form in forms:
        g = torch.Generator().manual_seed(0)
        count, nonfinite = len(POINTS), torch.zeros(1, dtype=torch.int64)
        params = [torch.randn(300, generator=g).to(dtype) for _ in range(count)]
        grads = [torch.randn(300, generator=g) for _ in range(count)]
        m, v = ([torch.rand(300, generator=g) for _ in range(count)] for _ in range(2))
        states = [list(x) for x in zip(*(eight_bit((300,)) for _ in range(count)), strict=True)]
        options = {**FULL, **form, "tensor_ids": range(count), "nonfinite": nonfinite}
        kernels.adamw_step(params, grads, m, v, **options)
        kernels.adamw_blockwise_step(params, grads, *states, **options)
        del options["tensor_ids"], options["weight_decay"]
        kernels.adamw_direction(grads, m, v, **options)
        kernels.adamw_blockwise_direction(grads, *states, **options)
        results.append([*params, *grads, *m, *v, *(t for s in states for t in s)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not torch.equal(results[0][0], results[0][1])


@given(
    step=st.sampled_from(POINTS) | st.integers(1, 1 << 32),
    lr=st.floats(1e-8, 10.0),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.99, 0.999999)]),
)
def test_bias_corrections_against_float64(step, lr, betas):
    """With moments that are the gradient's, the update is the rate over both corrections."""
    step = min(step, (1 << 32) - 1)
    update, m, v = torch.ones(1), torch.ones(1), torch.ones(1)
    nonfinite, eps = torch.zeros(1, dtype=torch.int64), 1e-8
    hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps}
    kernels.adamw_direction([update], [m], [v], steps=[step], nonfinite=nonfinite, **hyper)
    first, second = (-np.expm1(step * np.log(beta)) if beta else 1.0 for beta in betas)
    exact = -lr / first / (1 / np.sqrt(second) + eps)
    # Two roundings in numbers of the step, and of four operations; the second moment's is as much.
    assert update.item() == pytest.approx(exact, rel=8 * 2.0**-24)


def test_counters_are_checked():
    p, m, v = torch.ones(4), torch.zeros(4), torch.zeros(4)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    one = torch.ones(())

    def call(**options):
        options = {**FULL, "steps": [one], **options}
        kernels.adamw_step(
            [p], [p.clone()], [m], [v], tensor_ids=[0], nonfinite=nonfinite, **options
        )

    for message, options in {
        r"adamw_step: step_tensors\[0\] must have one element": {"steps": [torch.ones(2)]},
        r"adamw_step: step_tensors\[0\] must have dtype float32": {"steps": [one.double()]},
        r"adamw_step: step_tensors must hold 1 tensors.* got 2": {"steps": [one, one]},
        r"adamw_step: step_tensors\[1\] must be a tensor": {"steps": [one, 1]},
        r"adamw_step: lr_tensor must have dtype float32": {"lr": one.bfloat16()},
        r"adamw_step: lr_tensor must have one element": {"lr": torch.ones(2)},
        r"adamw_step: params\[0\] is written and shares memory": {"lr": p[:1]},
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call(**options)
    assert (p == 1).all()
    assert one == 1
    call()
    assert (p < 1).all()


def test_arguments_are_checked_before_anything_is_written():
    p, m, v = torch.ones(4), torch.zeros(4), torch.zeros(4)
    common = {"steps": [1], "tensor_ids": [0], "nonfinite": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(
        ValueError, match=r"adamw_step: grads\[0\] must have shape \[4\], got \[5\]"
    ):
        kernels.adamw_step([p], [torch.ones(5)], [m], [v], **common, **FULL)
    with pytest.raises(ValueError, match=r"adamw_step: beta1 must be in \[0, 1\), got 1"):
        kernels.adamw_step([p], [p.clone()], [m], [v], **common, **{**FULL, "beta1": 1.0})
    with pytest.raises(TypeError, match=r"exp_avg\[0\] must have dtype float32, got float16"):
        kernels.adamw_step([p], [p.clone()], [m.half()], [v], **common, **FULL)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        kernels.adamw_step([p], [p.clone()], [m], [v], **{**common, "steps": [0]}, **FULL)
    assert (p == 1).all()
