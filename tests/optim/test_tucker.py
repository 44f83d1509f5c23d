"""GaLore on tensors of order above 2 in Tucker form, against NumPy's HOSVD and HOOI in float64."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from tests.optim import test_drop_in as drop_in
from torch import nn

import gradpress
from gradpress.optim._hooi import Search, decompose
from gradpress.optim._moments import turn_moments
from gradpress.optim._tucker import Factors, ModeTurns, ranks_of
from gradpress.optim.galore import GaLoreAdamW

# Orders 3, 4 and 5; odd sizes, sizes of 1, convolutions, modes longer than all others together.
SHAPES = [
    ((7, 5, 6), 3),
    ((16, 8, 3, 3), (5, 4, 3, 2)),
    ((4, 6, 5, 3, 2), 0.3),
    ((5, 1, 9, 4), 2),
    ((1, 8, 7), 3),
    ((33, 2, 3), (8, 2, 2)),
    ((2, 3, 40), (2, 2, 9)),
    ((6, 2, 3), 2),
]
shapes = pytest.mark.parametrize(("shape", "rank"), SHAPES)


def tucker(params, **options):
    options = {"weight_decay": 0.0, "tensor_projection": "tucker", **options}
    return GaLoreAdamW(params, **options)


def plain_sgd(**options):
    """Options with which Adam's denominator is a constant: a step of 1e-2 along the gradient."""
    return {"lr": 1e4, "eps": 1e6, "betas": (0.0, 0.0), "scale": 1.0, **options}


# The references: Kolda and Bader 2009, figures 4.3 and 4.4.


def unfold(x, mode):
    return np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)


def mode_product(x, matrix, mode):
    return np.moveaxis(np.tensordot(matrix, x, (1, mode)), 0, mode)


def all_modes(x, matrices, but=None):
    for k, matrix in enumerate(matrices):
        x = x if k == but else mode_product(x, matrix, k)
    return x


def leading(matrix, rank):
    return np.linalg.svd(matrix, full_matrices=True)[0][:, :rank]


def hosvd(x, ranks):
    return [leading(unfold(x, k), rank) for k, rank in enumerate(ranks)]


def hooi(x, ranks, sweeps=6):
    factors = hosvd(x, ranks)
    for _ in range(sweeps):
        for k, rank in enumerate(ranks):
            others = all_modes(x, [f.T for f in factors], but=k)
            factors[k] = leading(unfold(others, k), rank)
    return factors


def energy(x, factors):
    return np.sum(all_modes(x, [f.T for f in factors]) ** 2) / np.sum(x**2)


def approximation(x, factors):
    return all_modes(all_modes(x, [f.T for f in factors]), factors)


def tensor(shape, generator, decay=0.6):
    """Random, with a spectrum in every mode that falls by `decay` from direction to direction."""
    x = generator.standard_normal(shape)
    for k, n in enumerate(shape):
        turn = np.linalg.qr(generator.standard_normal((n, n)))[0]
        x = mode_product(x, turn * decay ** np.arange(n), k)
    return x


def found(x, ranks, start=None, step=0):
    grad = torch.tensor(x).float() if isinstance(x, np.ndarray) else x
    units = tuple(torch.eye(n, r) for n, r in zip(grad.shape, ranks, strict=True))
    earlier = start or Factors(tuple(grad.shape), units)
    return decompose(grad, earlier, Search(start is not None, 0, 0, step))


def in_float64(factors):
    return [matrix.double().numpy() for matrix in factors.matrices]


# The decomposition


@st.composite
def problems(draw):
    order = draw(st.integers(3, 5))
    most = {3: 12, 4: 7, 5: 5}[order]
    shape = tuple(draw(st.lists(st.integers(1, most), min_size=order, max_size=order)))
    return shape, tuple(draw(st.integers(1, n)) for n in shape), draw(st.integers(0, 999))


@given(problems(), st.sampled_from([0.0, 0.03, 0.3]))
def test_captures_what_the_converged_iteration_does(problem, noise):
    """Of a tensor of these ranks with noise on it, for which there is one best form."""
    shape, ranks, seed = problem
    generator = np.random.default_rng(seed)
    x = all_modes(generator.standard_normal(ranks), hosvd(generator.standard_normal(shape), ranks))
    x += noise * np.linalg.norm(x) * generator.standard_normal(shape) / math.sqrt(x.size)
    factors, share = found(x, ranks)
    ours = in_float64(factors)
    for matrix in ours:
        # float32 columns.
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(matrix.shape[1]), atol=1e-5)
    assert share == pytest.approx(energy(x, ours), abs=1e-5)
    assert share > energy(x, hooi(x, ranks, 8)) - 1e-3


@given(problems(), st.sampled_from([0.3, 0.7, 1.0]))
def test_captures_what_the_hosvd_does_of_anything(problem, decay):
    shape, ranks, seed = problem
    x = tensor(shape, np.random.default_rng(seed), decay)
    assert found(x, ranks)[1] > energy(x, hosvd(x, ranks)) - 1e-3


def test_captures_what_one_sweep_does_on_average():
    """Of noise, which has many stationary points: now more, now less."""
    generator, ours, hosvds, sweeps = np.random.default_rng(1), [], [], []
    for _ in range(20):
        x = generator.standard_normal((10, 9, 8))
        ours.append(found(x, (3, 3, 3))[1])
        hosvds.append(energy(x, hosvd(x, (3, 3, 3))))
        sweeps.append(energy(x, hooi(x, (3, 3, 3), 1)))
    assert np.mean(ours) > np.mean(sweeps) - 1e-3
    assert np.mean(ours) > np.mean(hosvds) + 0.05


@shapes
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_error_is_within_the_bound_of_hosvd(shape, rank, decay):
    """At most the sum over the modes of what each truncation alone loses: N times the least."""
    x = tensor(shape, np.random.default_rng(2), decay)
    ranks = ranks_of(shape, rank)
    tails = [
        np.sum(np.linalg.svd(unfold(x, k), compute_uv=False)[r:] ** 2) for k, r in enumerate(ranks)
    ]
    error = np.sum((x - approximation(x, in_float64(found(x, ranks)[0]))) ** 2)
    assert error <= sum(tails) + 1e-6 * np.sum(x**2)
    # Nothing of these ranks is nearer than the worst mode allows.
    assert error >= max(tails) * (1 - 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@shapes
def test_noise_is_captured_better_than_by_hosvd(shape, rank, dtype):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    x, ranks = grad.double().numpy(), ranks_of(shape, rank)
    assert found(grad, ranks)[1] > energy(x, hosvd(x, ranks)) - 1e-3


@shapes
def test_a_tensor_of_these_ranks_is_recovered(shape, rank):
    generator = np.random.default_rng(4)
    ranks = ranks_of(shape, rank)
    bases = [np.linalg.qr(generator.standard_normal((n, n)))[0][:, :r]
             for n, r in zip(shape, ranks, strict=True)]  # fmt: skip
    x = all_modes(generator.standard_normal(ranks), bases)
    factors, share = found(x, ranks)
    # Six digits: float32.
    assert share == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(approximation(x, in_float64(factors)), x, atol=3e-5)


@shapes
def test_a_warm_search_finds_what_has_nothing_to_do_with_the_last_one(shape, rank):
    generator, ranks = np.random.default_rng(5), ranks_of(shape, rank)
    start, _ = found(tensor(shape, generator), ranks)
    x = tensor(shape, generator)
    _, share = found(x, ranks, start, step=1)
    assert share > energy(x, hosvd(x, ranks)) - 1e-3


def test_a_warm_search_starts_from_the_last_one():
    """Directions of noise, which a random sketch alone does not find in one go."""
    x = np.random.default_rng(6).standard_normal((40, 30, 20))
    factors, first = found(x, (5, 5, 5))
    shares = [first]
    for step in range(1, 6):
        factors, share = found(x, (5, 5, 5), factors, step)
        shares.append(share)
    assert shares[-1] > shares[0] + 2e-3
    assert shares[-1] > energy(x, hooi(x, (5, 5, 5), 2)) - 1e-3


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_no_factors_of_what_is_zero_or_not_finite(value):
    grad = torch.zeros(4, 5, 6) if value == 0.0 else torch.ones(4, 5, 6)
    grad[1, 2, 3] = value
    assert found(grad, (2, 2, 2)) is None


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge_gradients(factor):
    x = tensor((6, 7, 8), np.random.default_rng(7))
    ((_, small), (_, plain)) = (found(x * f, (3, 3, 3)) for f in (factor, 1.0))
    assert small == pytest.approx(plain, abs=1e-4)


# Ranks


@given(
    st.lists(st.integers(1, 70), min_size=3, max_size=5),
    st.floats(1e-3, 0.999),
)
def test_a_fraction_is_one_of_the_parameters(shape, fraction):
    numel, squares = math.prod(shape), sum(n * n for n in shape)
    share = brentq(
        lambda c: c ** len(shape) * numel + c * squares - fraction * numel, 0.0, 1.0, xtol=1e-15
    )
    ranks = ranks_of(shape, fraction)
    for n, rank in zip(shape, ranks, strict=True):
        assert 1 <= rank <= n
        # Rounded to nearest.
        assert abs(rank - share * n) <= 0.5 + 1e-9 or rank == 1


def test_ranks_of_a_fourier_layer():
    shape = (64, 64, 32, 17, 2)
    assert ranks_of(shape, 0.2) == (46, 46, 23, 12, 1)
    ranks = ranks_of((64, 64, 32, 16), 0.2)
    parameters = math.prod(ranks) + sum(n * r for n, r in zip((64, 64, 32, 16), ranks, strict=True))
    assert parameters == pytest.approx(0.2 * 64 * 64 * 32 * 16, rel=0.05)


def test_ints_are_clamped_to_the_modes():
    assert ranks_of((5, 1, 9), 4) == (4, 1, 4)
    assert ranks_of((5, 1, 9), (9, 1, 2)) == (5, 1, 2)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.0, 2.0, math.nan, (2, 0, 2), (2, 0.5, 2), "auto"])
def test_invalid_ranks(rank):
    with pytest.raises(ValueError, match="Invalid rank value: "):
        tucker([nn.Parameter(torch.ones(3, 4, 5))], rank=rank)


@pytest.mark.parametrize(
    ("shape", "rank", "message"),
    [
        ((3, 4, 5), (2, 2), r"one rank for each mode, got a parameter of shape \[3, 4, 5\]"),
        ((3, 4), 0.2, r"an int for a matrix, got a parameter of shape \[3, 4\]"),
        ((3, 4), (2, 2), r"an int for a matrix, got a parameter of shape \[3, 4\]"),
    ],
)
def test_ranks_have_to_fit_the_parameters(shape, rank, message):
    with pytest.raises(ValueError, match=message):
        tucker([nn.Parameter(torch.ones(shape))], rank=rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_projection": "cp"}, "Invalid tensor_projection value: 'cp'"),
        ({"projector_bits": 8}, "Invalid projector_bits value: 8"),
        ({"tensor_projection": "matrix", "rank": 0.2}, "Invalid rank value: 0.2"),
        ({"tensor_projection": "matrix", "rank": (2, 2, 2)}, r"Invalid rank value: \(2, 2, 2\)"),
        ({"update_proj_gap": 0}, "Invalid update_proj_gap value: 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        tucker([nn.Parameter(torch.ones(3, 4, 5))], **{"rank": 2, **options})


# Steps


@shapes
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_full_ranks_with_a_linear_rule_are_sgd(shape, rank, proj_type):
    """Square factors lose nothing, whatever the gradient after the refresh."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = tucker([p], **plain_sgd(rank=99, update_proj_gap=3, proj_type=proj_type))
    sgd = torch.optim.SGD([q], lr=1e-2)
    for _ in range(7):
        # Depends on the parameters, so that an error would go on growing.
        p.grad, q.grad = (torch.sin(3 * w.detach()) for w in (p, q))
        ours.step()
        sgd.step()
    moved = float((q - start).detach().norm())
    assert float((p - q).detach().norm()) < 1e-5 * moved
    assert ours.refresh_counts() == {"0": 3}
    state = ours.state[p]
    assert tuple(state["exp_avg"].shape) == shape
    assert state["projector_energy"] == pytest.approx(1.0, abs=1e-5)


@shapes
def test_after_a_refresh_the_step_is_along_the_approximation(shape, rank):
    grad = tensor(shape, np.random.default_rng(8))
    p = nn.Parameter(torch.zeros(shape))
    optimizer = tucker([p], **plain_sgd(rank=rank))
    p.grad = torch.tensor(grad).float()
    optimizer.step()
    change = -p.detach().double().numpy() / 1e-2
    residual = np.sum((grad - change) ** 2) / np.sum(grad**2)
    best = hooi(grad, ranks_of(shape, rank))
    assert residual < 1 - energy(grad, best) + 1e-3
    assert optimizer.state[p]["projector_energy"] == pytest.approx(1 - residual, abs=1e-5)


@shapes
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adam_runs_in_the_core(shape, rank, decay):
    """The moments are the core's, and what is brought back is Adam's result."""
    generator = np.random.default_rng(9)
    w = generator.standard_normal(shape)
    p = nn.Parameter(torch.tensor(w).float())
    numbers = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": decay}
    optimizer = tucker([p], rank=rank, scale=0.5, **numbers)
    m = v = 0.0
    for t in range(1, 6):
        grad = generator.standard_normal(shape)
        p.grad = torch.tensor(grad).float()
        optimizer.step()
        factors = in_float64(Factors.of(optimizer.state[p], p))
        core = all_modes(grad, [f.T for f in factors])
        m, v = 0.8 * m + 0.2 * core, 0.9 * v + 0.1 * core**2
        direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        w = w * (1 - 0.03 * decay) - 0.03 * 0.5 * all_modes(direction, factors)
    assert tuple(optimizer.state[p]["exp_avg"].shape) == ranks_of(shape, rank)
    # A core entry near zero, whose sign float32 may miss, is damped by a large epsilon.
    np.testing.assert_allclose(p.detach().numpy(), w, atol=2e-4)


@pytest.mark.parametrize("reference", [False, True])
def test_reference_is_the_form_of_the_released_code(reference):
    grad = torch.tensor(tensor((6, 7, 4), np.random.default_rng(10))).float()
    p = nn.Parameter(torch.ones(6, 7, 4))
    optimizer = tucker([p], lr=0.01, rank=3, eps=0.05, scale=1.0, weight_decay=0.5,
                       reference=reference)  # fmt: skip
    p.grad = grad
    optimizer.step()
    factors = in_float64(Factors.of(optimizer.state[p], p))
    core = all_modes(grad.double().numpy(), [f.T for f in factors])
    eps = 0.05 / math.sqrt(1 - 0.999) if reference else 0.05
    step = 0.01 * all_modes(core / (np.abs(core) + eps), factors)
    want = (1 - step) * (1 - 0.005) if reference else (1 - 0.005) - step
    np.testing.assert_allclose(p.detach().numpy(), want, atol=1e-5)


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        lambda x: torch.stack((x, x), dim=-1)[..., 0],
    ],
)
def test_strides_do_not_matter(strided):
    results = []
    for arrange in (lambda x: x, strided):
        p = nn.Parameter(arrange(torch.ones(6, 4, 3, 5)))
        optimizer = tucker([p], rank=(3, 2, 3, 2), lr=1e-2, update_proj_gap=2)
        for t in range(4):
            grad = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(t))
            p.grad = arrange(grad)
            optimizer.step()
        assert p.stride() == arrange(torch.ones(6, 4, 3, 5)).stride()
        results.append(p.detach().contiguous())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(6, 4, 3, 5))


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_narrow_parameters(dtype, near):
    """Near by about what rounding in each of the steps adds up to."""
    results = []
    for kind in (torch.float32, dtype):
        p = nn.Parameter(torch.ones(12, 6, 3, 3, dtype=kind))
        optimizer = tucker([p], rank=3, lr=1e-2, scale=1.0, update_proj_gap=2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            p.grad = torch.randn(12, 6, 3, 3, generator=generator).to(dtype).to(kind)
            optimizer.step()
        assert p.dtype == kind
        assert optimizer.state[p]["projector_factor_0"].dtype == torch.float32
        results.append(p.detach().float())
    assert float((results[0] - results[1]).abs().max()) < near
    assert float((results[0] - 1).abs().max()) > 2e-2


@pytest.mark.parametrize(("state_bits", "near"), [(8, 0.05), (4, 0.5)])
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_moments_of_few_bits_stay_near(state_bits, near, moments):
    results = []
    for bits in (32, state_bits):
        p = nn.Parameter(torch.zeros(16, 8, 6))
        optimizer = tucker([p], lr=1e-2, rank=6, update_proj_gap=6, moments=moments,
                           state_bits=bits, min_8bit_size=1)  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        drift = torch.randn(16, 8, 6, generator=generator)
        for _ in range(16):
            p.grad = drift + torch.randn(16, 8, 6, generator=generator)
            optimizer.step()
        results.append(p.detach())
        assert ("exp_avg_codes" in optimizer.state[p]) == (bits != 32)
    assert float((results[0] - results[1]).norm()) < near * float(results[0].norm())


def test_matrices_of_such_a_group_are_projected_as_ever():
    results = []
    for projection in ("matrix", "tucker"):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.ones(9, 6)), nn.Parameter(torch.ones(7))]
        optimizer = tucker(weights, rank=2, update_proj_gap=2, tensor_projection=projection)
        for _ in range(4):
            for p in weights:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        results.append(torch.cat([p.detach().view(-1) for p in weights]))
    assert torch.equal(*results)


def test_groups_choose():
    a, b = nn.Parameter(torch.ones(6, 4, 5)), nn.Parameter(torch.ones(6, 4, 5))
    groups = [{"params": [a], "rank": (2, 3, 1)}, {"params": [b], "tensor_projection": "matrix"}]
    optimizer = tucker(groups, rank=3)
    a.grad, b.grad = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    optimizer.step()
    assert tuple(optimizer.state[a]["exp_avg"].shape) == (2, 3, 1)
    assert tuple(optimizer.state[b]["exp_avg"].shape) == (3, 20)
    first, second = optimizer.report().rows
    assert (first.rank, second.rank) == (3, 3)
    assert [optimizer.state[a][f"projector_rank_{k}"] for k in range(3)] == [2, 3, 1]
    assert 0.0 < first.energy < 1.0


def test_maximize_goes_the_other_way():
    results = []
    for maximize in (False, True):
        p = nn.Parameter(torch.zeros(5, 4, 3))
        optimizer = tucker([p], rank=2, lr=1e-2, maximize=maximize)
        p.grad = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(results[0], -results[1])
    assert float(results[0].norm()) > 0


# Refreshes


def test_zero_and_poisoned_gradients_keep_factors_and_weights():
    p = nn.Parameter(torch.randn(8, 6, 5))
    optimizer = tucker([p], rank=3, update_proj_gap=2, moments="rotate")

    def factors():
        return [f.clone() for f in Factors.of(optimizer.state[p], p).matrices]

    p.grad = torch.zeros(8, 6, 5)
    optimizer.step()
    assert all(torch.equal(f, torch.eye(*f.shape)) for f in factors())
    p.grad = torch.randn(8, 6, 5)
    optimizer.step()
    assert optimizer.refresh_counts() == {"0": 1}
    before, weights = factors(), p.detach().clone()
    for value in (0.0, math.nan):
        # The moments would move the weights even where the gradient is zero.
        optimizer.param_groups[0]["lr"] = 0.0
        p.grad = torch.full((8, 6, 5), value)
        optimizer.step()
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, factors(), strict=True))
    assert torch.equal(p, weights)
    assert optimizer.refresh_counts() == {"0": 1}


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_turned_moments_follow_the_rule_of_ldadam(order, steps):
    """Of all modes at once: the Kronecker product of the turns, and its entries squared."""
    generator = np.random.default_rng(0)
    old, new = (3, 4, 2, 3)[:order], (3, 4, 2, 3)[:order]
    turns = [generator.standard_normal(s) / 2 for s in zip(old, new, strict=True)]
    m, v = generator.standard_normal(old), generator.random(old) + 1
    state = {"exp_avg": torch.tensor(m).float(), "exp_avg_sq": torch.tensor(v).float()}
    turn = ModeTurns(tuple(torch.tensor(t).float() for t in turns))
    turn_moments(state, old, turn, steps, {"betas": (0.9, 0.99)})
    if steps:
        whole = np.eye(1)
        for t in turns:
            whole = np.kron(whole, t.T)
        bias = 1 - 0.9**steps, 1 - 0.99**steps
        mean, square = m.ravel() / bias[0], v.ravel() / bias[1]
        m = bias[0] * (whole @ mean)
        v = bias[1] * np.abs(whole**2 @ (square - mean**2) + (whole @ mean) ** 2)
    np.testing.assert_allclose(state["exp_avg"].numpy().ravel(), m.ravel(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state["exp_avg_sq"].numpy().ravel(), v.ravel(), rtol=1e-4, atol=1e-4)


def test_turned_moments_are_those_of_the_new_coordinates():
    """Of a constant gradient: the first moment is linear, and the variance is zero."""
    p = nn.Parameter(torch.zeros(5, 4, 6))
    optimizer = tucker([p], rank=6, update_proj_gap=5, betas=(0.9, 0.99), eps=0.0, moments="rotate")
    generator = np.random.default_rng(1)
    first, other = (generator.standard_normal((5, 4, 6)) for _ in range(2))
    for t in range(6):
        p.grad = torch.tensor(first if t < 5 else other).float()
        optimizer.step()
    state = optimizer.state[p]
    factors = in_float64(Factors.of(state, p))
    r, now = (all_modes(g, [f.T for f in factors]) for g in (first, other))
    mean, square = (1 - 0.9**5) * r, (1 - 0.99**5) * r**2
    np.testing.assert_allclose(state["exp_avg"].numpy(), 0.9 * mean + 0.1 * now, atol=1e-5)
    want = 0.99 * square + 0.01 * now**2
    np.testing.assert_allclose(state["exp_avg_sq"].numpy(), want, atol=1e-5)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_turned_moments_do_not_jump(state_bits):
    """Where the directions of a mode change places, kept moments go to the wrong ones."""
    generator = np.random.default_rng(2)
    bases = [np.linalg.qr(generator.standard_normal((n, 2)))[0] for n in (8, 7, 6)]
    jumps = {}
    for moments in ("keep", "rotate"):
        p = nn.Parameter(torch.zeros(8, 7, 6))
        # An epsilon that hides the core's entries that are zero but for rounding.
        optimizer = tucker([p], lr=1e-2, eps=1e-2, rank=2, scale=1.0, update_proj_gap=40,
                           moments=moments, state_bits=state_bits, min_8bit_size=1)  # fmt: skip
        steps = []
        for t in range(42):
            core = np.zeros((2, 2, 2))
            core[0, 0, 0], core[1, 1, 1] = (4.0, 1.0) if t < 40 else (1.0, 4.0)
            p.grad = torch.tensor(all_modes(core, bases)).float()
            before = p.detach().clone()
            optimizer.step()
            steps.append(p.detach() - before)
        jumps[moments] = float((steps[40] - steps[39]).norm() / steps[39].norm())
    assert jumps["rotate"] < 0.5 * jumps["keep"]


def test_a_reset_begins_anew_bias_correction_included():
    p = nn.Parameter(torch.zeros(6, 5, 4))
    optimizer = tucker([p], lr=1e-2, eps=1e-2, rank=3, scale=1.0, moments="reset",
                       update_proj_gap=5)  # fmt: skip
    for _ in range(11):
        before = p.detach().clone()
        p.grad = torch.randn(6, 5, 4)
        optimizer.step()
    factors = in_float64(Factors.of(optimizer.state[p], p))
    core = all_modes(p.grad.double().numpy(), [f.T for f in factors])
    want = -1e-2 * all_modes(core / (np.abs(core) + 1e-2), factors)
    np.testing.assert_allclose((p.detach() - before).numpy(), want, atol=1e-6)
    assert optimizer.refresh_counts() == {"0": 3}


# Each fault of the released projector of tensors has a test that it would not pass.


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_every_type_of_projection_makes_one(proj_type):
    results = []
    for chosen in ("std", proj_type):
        p = nn.Parameter(torch.ones(4, 5, 6))
        optimizer = tucker([p], rank=2, proj_type=chosen)
        p.grad = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(("steps", "gap"), [(10, 3), (9, 3), (1, 3), (5, 1), (4, 200)])
def test_refreshes_come_exactly_at_multiples_of_the_interval(steps, gap):
    p = nn.Parameter(torch.randn(6, 4, 5))
    optimizer = tucker([p], rank=2, update_proj_gap=gap)
    at, before = [], None
    for t in range(steps):
        p.grad = torch.randn(6, 4, 5)
        optimizer.step()
        now = torch.cat([f.reshape(-1) for f in Factors.of(optimizer.state[p], p).matrices])
        if before is None or not torch.equal(before, now):
            at.append(t)
        before = now.clone()
    assert at == list(range(0, steps, gap))
    assert optimizer.refresh_counts() == {"0": math.ceil(steps / gap)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_resumed_within_an_interval_it_goes_on_alike(at, dtype):
    def make():
        p = nn.Parameter(torch.ones(6, 4, 5, dtype=dtype))
        return p, tucker([p], rank=3, update_proj_gap=3, moments="rotate", lr=1e-2)

    def train(p, optimizer, first, last):
        for t in range(first, last):
            p.grad = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(t)).to(dtype)
            optimizer.step()

    p, optimizer = make()
    train(p, optimizer, 0, at)
    q, restored = make()
    with torch.no_grad():
        q.copy_(p)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.state[q]["projector_factor_2"].dtype == torch.float32
    train(p, optimizer, at, 10)
    train(q, restored, at, 10)
    assert torch.equal(p, q)
    assert optimizer.refresh_counts() == restored.refresh_counts() == {"0": 4}


def test_what_comes_back_is_adams_result_and_not_the_gradient():
    """A gradient of unequal core entries, of which Adam's first step makes equal ones."""
    p = nn.Parameter(torch.zeros(6, 5, 4))
    optimizer = tucker([p], lr=1e-2, rank=2, scale=1.0)
    p.grad = torch.tensor(tensor((6, 5, 4), np.random.default_rng(3), 0.4)).float()
    optimizer.step()
    factors = in_float64(Factors.of(optimizer.state[p], p))
    gradient, change = (
        all_modes(x.detach().double().numpy(), [f.T for f in factors]) for x in (p.grad, p)
    )
    np.testing.assert_allclose(change, -1e-2 * np.sign(gradient), rtol=1e-3)
    assert np.abs(gradient).max() > 5 * np.abs(gradient).min()


def test_the_state_is_on_the_parameters_device():
    p = torch.empty(6, 4, 5, device="meta")
    optimizer = tucker([nn.Parameter(p)], rank=2)
    planned = optimizer._planned_state(optimizer.param_groups[0], p)
    tensors = {n: t for n, t in planned.items() if isinstance(t, torch.Tensor) and n != "step"}
    assert len([name for name in tensors if name.startswith("projector_factor")]) == 3
    assert all(t.device == p.device for t in tensors.values())


# What every optimizer of the package does


class Block(nn.Module):
    """Weights of order 5, 3 and 2, of the interface of the common tests' model."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.Parameter(torch.randn(2, 3, 4, 4, 6) / 5)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.wide = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)

    def forward(self, x):
        h = torch.einsum("nabc,abcde->nde", x.view(-1, 2, 3, 4), self.spectral)
        h = self.conv(torch.relu(h)).flatten(1)
        return self.norm(self.wide(h) + x)


def grouped(model, rank, matrix_rank=3, **options):
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() > 2], "rank": rank},
        {"params": [(n, p) for n, p in named if p.dim() == 2], "rank": matrix_rank},
        {"params": [(n, p) for n, p in named if p.dim() < 2]},
    ]
    options = {"tensor_projection": "tucker", "update_proj_gap": 3, **drop_in.SMALL, **options}
    return GaLoreAdamW(groups, lr=1e-2, **options)


def tucker32bit(model, **options):
    return grouped(model, 0.4, **options)


def tucker_rotating(model, **options):
    return grouped(model, 3, state_bits=8, moments="rotate", stagger=True, **options)


def tucker_int8(model, **options):
    """Integer weights beside, in the same groups."""
    own = {"state_bits": 8, "moments": "reset", "reference": True, "scale": 1.0}
    return grouped(gradpress.nn.quantize_(model), 2, **own, **options)


CHECKS = [
    drop_in.test_deepcopy_and_pickle_go_on_alike,
    drop_in.test_no_gradient_and_zero_learning_rate_change_nothing,
    drop_in.test_state_is_tensors_and_numbers,
    drop_in.test_gradients_and_groups_are_left_alone,
    drop_in.test_closure_and_hooks,
    drop_in.test_grad_scaler,
    drop_in.test_nonfinite_gradients_are_skipped_and_counted,
    drop_in.test_late_groups_schedulers_and_tensor_rates,
    drop_in.test_shapes_of_all_kinds,
]
makers = pytest.mark.parametrize("make", [tucker32bit, tucker_rotating, tucker_int8])


@pytest.fixture(autouse=True)
def tensors_in_common_tests(monkeypatch):
    monkeypatch.setattr(drop_in, "Block", Block)


@makers
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_drop_in(make, check):
    check(make)


def test_learns():
    drop_in.test_learns(tucker_rotating)


@makers
@pytest.mark.parametrize("safe", [True, False])
def test_resume_is_bit_exact(make, safe):
    drop_in.test_resume_is_bit_exact(make, safe)


@makers
@pytest.mark.parametrize("flatten", [True, False])
def test_distributed_checkpoint_state(make, flatten):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drop_in.test_distributed_checkpoint_state(make, flatten)


@makers
def test_same_bits_for_all_threads(make, restore_threads):
    drop_in.test_same_bits_for_all_threads(make, 3, restore_threads)


@pytest.mark.parametrize(("shape", "rank"), [((64, 40, 9, 5), 0.3), ((300, 16, 3, 3), 24)])
def test_same_bits_for_all_threads_where_products_are_long(shape, rank, restore_threads):
    results = []
    for threads in (1, 4):
        torch.set_num_threads(1)
        p = nn.Parameter(torch.zeros(shape))
        optimizer = tucker([p], rank=rank, moments="rotate", update_proj_gap=2)
        for t in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        results.append((p.detach(), optimizer.state[p]["projector_energy"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert float(results[0][0].norm()) > 0


def test_memory_is_planned_and_counted():
    model = nn.ParameterList([nn.Parameter(torch.randn(12, 8, 3, 3))])
    optimizer = tucker(model.parameters(), rank=4)
    planned = gradpress.memory.plan(model, optimizer)
    for p in model:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    counted = gradpress.memory.count(model, optimizer)
    assert planned.by_category == counted.by_category
    assert counted.by_category["projectors"] == 4 * (12 * 4 + 8 * 4 + 3 * 3 + 3 * 3)
    assert counted.by_category["optimizer_states"] == 2 * 4 * (4 * 4 * 3 * 3) + 4


def test_complex_tensors_are_refused():
    p = nn.Parameter(torch.ones(3, 4, 5, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="does not support complex"):
        tucker([p], rank=2).step()


def test_tensors_without_elements_take_no_step():
    p, q = nn.Parameter(torch.ones(0, 3, 4)), nn.Parameter(torch.ones(2, 3, 4))
    p.grad, q.grad = torch.ones(0, 3, 4), torch.ones(2, 3, 4)
    optimizer = tucker([p, q], rank=0.5)
    optimizer.step()
    assert optimizer.refresh_counts() == {"1": 1}
