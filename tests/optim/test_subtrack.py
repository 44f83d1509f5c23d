"""SubTrack++: subspaces that turn along geodesics, and what turns with them."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradpress
from gradpress.optim import _geodesic, _projector
from gradpress.optim.subtrack import SubTrack

SHAPES = [(12, 7), (7, 12), (9, 9)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def subtrack(params, **options):
    return SubTrack(params, **{"weight_decay": 0.0, **options})


def orthonormal(rows, columns, generator):
    return np.linalg.qr(generator.standard_normal((rows, columns)))[0]


def upright(matrix):
    """Wide: the subspace is one of columns of the shorter length."""
    return matrix if matrix.shape[0] < matrix.shape[1] else matrix.T


def left_over(grad, basis):
    return np.linalg.norm(grad - basis @ (basis.T @ grad)) ** 2


def leading_triple(grad, basis):
    """Of the loss's gradient, in float64."""
    low_rank = basis.T @ grad
    u, s, vt = np.linalg.svd(-2 * (grad - basis @ low_rank) @ low_rank.T)
    return u[:, 0], s[0], vt[0]


def turned(grad, basis, eta):
    """One turn in float64, from the paper's formula; `eta` None searches the geodesic."""
    u, sigma, v = leading_triple(grad, basis)

    def at(angle):
        change = basis @ v * (math.cos(angle) - 1) - u * math.sin(angle)
        return basis + np.outer(change, v)

    if eta is not None:
        return at(eta * sigma)
    # The loss is a sinusoid of twice the angle, known by three of its values.
    zero, quarter, half = (left_over(grad, at(a)) for a in (0, math.pi / 4, math.pi / 2))
    middle = (zero + half) / 2
    return at(math.atan2(middle - quarter, middle - zero) / 2)


def basis_of(optimizer, p):
    group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
    return _projector.load_basis(optimizer.state[p], tuple(p.shape), group).double().numpy()


def step(optimizer, p, grad):
    p.grad = torch.as_tensor(grad).float().clone()
    optimizer.step()


# The geodesic


def test_bases_stay_orthonormal_for_a_thousand_turns():
    """By angles of the least loss and by arbitrary ones, towards gradients of both shapes."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.eye(7, 3)
    for i in range(1000):
        grad = torch.randn((12, 7) if i % 2 else (7, 12), generator=generator)
        basis = _geodesic.descend(
            grad, _geodesic.orthonormalized(basis), (None, 0.3)[i % 3 > 0]
        ).basis
    exact = basis.double().numpy()
    assert np.abs(exact.T @ exact - np.eye(3)).max() < 1e-5
    assert np.abs(exact - np.eye(7, 3)).max() > 0.1


@given(
    short=st.integers(2, 12),
    more=st.integers(0, 20),
    rank=st.integers(1, 11),
    wide=st.booleans(),
    eta=st.sampled_from([None, 1e-3, 0.1, 10.0]),
    size=st.sampled_from([1e-18, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_turns_are_those_of_the_formula(short, more, rank, wide, eta, size, seed):
    """Gradients as small as they get, for which squares are not numbers of float32."""
    rank = min(rank, short - 1)
    generator = np.random.default_rng(seed)
    grad = generator.standard_normal((short, short + more)).astype(np.float32)
    start = orthonormal(short, rank, generator).astype(np.float32)
    sided = grad if wide and more else grad.T
    rate = None if eta is None else eta / size**2
    move = _geodesic.descend(
        torch.tensor(sided * np.float32(size)).contiguous(), torch.tensor(start), rate
    )
    exact = upright(sided).astype(np.float64)
    if not more and wide:
        exact = sided.T.astype(np.float64)
    basis = start.astype(np.float64)
    want = turned(exact, basis, eta)
    sigma = leading_triple(exact, basis)[1]
    second = np.linalg.svd(-2 * (exact - basis @ (basis.T @ exact)) @ (basis.T @ exact).T)[1]
    distinct = second.size == 1 or second[1] < 0.95 * second[0]
    if not distinct or sigma < 1e-2 * np.linalg.norm(exact) ** 2:
        return  # which plane is the leading one is for the rounding to decide
    # An error of 1e-6 in sigma is eta times that in the angle.
    near = 1e-5 * (1 + (0 if eta is None else eta * sigma))
    assert np.abs(move.basis.numpy() - want).max() < near
    share = 1 - left_over(exact, want) / np.linalg.norm(exact) ** 2
    assert move.energy == pytest.approx(share, abs=near)


@given(
    rows=st.integers(2, 16),
    columns=st.integers(2, 16),
    rank=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_no_angle_leaves_less_than_the_one_by_default(rows, columns, rank, seed):
    rank = min(rank, min(rows, columns) - 1)
    generator = np.random.default_rng(seed)
    start = orthonormal(min(rows, columns), rank, generator)
    grad = generator.standard_normal((rows, columns))
    move = _geodesic.descend(torch.tensor(grad).float(), torch.tensor(start).float(), None)
    exact = grad if rows < columns else grad.T
    left = left_over(exact, move.basis.double().numpy())
    assert left < left_over(exact, start)
    u, _, v = leading_triple(exact, start)
    for angle in np.linspace(0, 2 * math.pi, 200):
        change = start @ v * (math.cos(angle) - 1) - u * math.sin(angle)
        least = left_over(exact, start + np.outer(change, v))
        assert left < least + 1e-5 * np.linalg.norm(exact) ** 2


@pytest.mark.parametrize("tall", [True, False])
def test_a_nearly_stationary_subspace_stays_orthonormal_too(tall):
    """By an angle of one, of a tangent that is hardly more than what rounding makes of zero."""
    generator = np.random.default_rng(0)
    start = torch.tensor(orthonormal(200, 20, generator)).float()
    basis = start.double().numpy()
    grad = basis @ generator.standard_normal((20, 300))
    grad += 1e-5 * generator.standard_normal((200, 300))
    sigma = leading_triple(grad, basis)[1]
    sided = torch.tensor(grad.T if tall else grad).float().contiguous()
    move = _geodesic.descend(sided, start, 1 / sigma)
    assert move.angle == pytest.approx(1, rel=0.05)
    new = move.basis.double().numpy()
    assert np.abs(new.T @ new - np.eye(20)).max() < 2e-6


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1, 0.4])
@pytest.mark.parametrize("scaled", [0.1, 1.0, 4.0])
def test_orthonormalized_is_the_polar_factor(noise, scaled):
    generator = np.random.default_rng(0)
    start = scaled * (
        orthonormal(30, 6, generator) + noise * generator.standard_normal((30, 6)) / 30**0.5
    )
    got = _geodesic.orthonormalized(torch.tensor(start).float()).numpy()
    want, _ = scipy.linalg.polar(start)
    assert np.abs(got - want).max() < 1e-5


def test_dependent_columns_have_no_polar_factor():
    basis = torch.eye(8, 3)
    assert _geodesic.orthonormalized(basis) is basis
    for column in (0.0, basis[:, 0]):
        poor = basis.clone()
        poor[:, 2] = column
        assert _geodesic.orthonormalized(poor) is None


def test_large_matrices_are_worked_on_in_runs():
    """More rows than are widened at a time, a last run of fewer rows than the rank, bfloat16."""
    generator = np.random.default_rng(0)
    rank, short, long = 520, 540, 1070
    basis = torch.tensor(orthonormal(short, rank, generator)).float()
    strong = np.outer(generator.standard_normal(short), generator.standard_normal(long))
    grad = torch.tensor(strong + generator.standard_normal((short, long))).bfloat16()
    exact = grad.double().numpy()
    want = turned(exact, basis.double().numpy(), None)
    for sided in (grad, grad.T.contiguous()):
        move = _geodesic.descend(sided, basis, None)
        assert np.abs(move.basis.numpy() - want).max() < 1e-4
        left = left_over(exact, want) / np.linalg.norm(exact) ** 2
        assert 1 - move.energy == pytest.approx(left, rel=1e-4)


# Subspaces of the optimizer


@shapes
def test_small_angles_are_eta_sigma(shape):
    generator = np.random.default_rng(1)
    first, second = (generator.standard_normal(shape) for _ in range(2))
    p = nn.Parameter(torch.zeros(shape))
    optimizer = subtrack([p], rank=3, update_proj_gap=1, subspace_lr=1e-3)
    step(optimizer, p, first)
    before = basis_of(optimizer, p)
    step(optimizer, p, second)
    grad = second if shape[0] < shape[1] else second.T
    _, sigma, _ = leading_triple(grad.astype(np.float32).astype(np.float64), before)
    angles = scipy.linalg.subspace_angles(before, basis_of(optimizer, p))
    assert 0.01 < 1e-3 * sigma < 0.2
    assert angles[0] == pytest.approx(1e-3 * sigma, abs=2e-6)
    assert angles[1:].max() < 2e-6


@shapes
@pytest.mark.parametrize("eta", [None, 2e-3])
def test_of_a_gradient_that_stays_less_and_less_is_left(shape, eta):
    generator = np.random.default_rng(2)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = subtrack([p], rank=3, update_proj_gap=1, subspace_lr=eta)
    step(optimizer, p, generator.standard_normal(shape))
    grad = generator.standard_normal(shape)
    sided = grad if shape[0] < shape[1] else grad.T
    least = np.sum(np.linalg.svd(grad)[1][3:] ** 2)
    left = [left_over(sided, basis_of(optimizer, p))]
    for _ in range(40):
        step(optimizer, p, grad)
        left.append(left_over(sided, basis_of(optimizer, p)))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(left))
    assert left[0] > 1.2 * least
    assert left[-1] < (1.001 * least if eta is None else 0.95 * left[0])


@pytest.mark.parametrize("shape", [(12, 7), (9, 9), (40, 2)])
def test_subspaces_of_columns_turn_too(shape):
    """In the original code they do not where there are at least as many rows."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = subtrack([p], rank=1, update_proj_gap=1, subspace_lr=0.01)
    step(optimizer, p, torch.randn(shape, generator=generator))
    before = basis_of(optimizer, p)
    step(optimizer, p, torch.randn(shape, generator=generator))
    assert scipy.linalg.subspace_angles(before, basis_of(optimizer, p))[0] > 1e-3


@pytest.mark.parametrize(
    ("size", "shape", "bits"),
    [
        (1e-12, (16, 40), None),
        (1e-3, (40, 16), None),
        (1e3, (16, 40), 8),
        (1e-6, (40, 16), 8),
        (1.0, (16, 40), 4),
    ],
)
def test_a_turning_subspace_is_followed_whatever_the_scale(size, shape, bits):
    generator = torch.Generator().manual_seed(0)
    start = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:, :3]
    axis = torch.randn(16, 16, generator=generator)
    turn = torch.matrix_exp(0.005 * (axis - axis.T))

    def shares(eta):
        directions = start * torch.tensor([1.0, 0.8, 0.6])
        p = nn.Parameter(torch.zeros(shape))
        optimizer = subtrack([p], rank=3, update_proj_gap=1, subspace_lr=eta, projector_bits=bits)
        found = []
        for _ in range(60):
            directions = turn @ directions
            grad = directions @ torch.randn(3, 40, generator=generator)
            step(optimizer, p, size * (grad if shape[0] < shape[1] else grad.T))
            basis = np.linalg.qr(basis_of(optimizer, p))[0]
            there = directions.double().numpy()
            found.append(1 - left_over(there, basis) / np.linalg.norm(there) ** 2)
        return np.mean(found[-30:])

    assert shares(None) > (0.93 if bits == 4 else 0.97)
    assert shares(0.0) < 0.8


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("everywhere", [True, False])
@shapes
def test_zero_and_poisoned_gradients_turn_nothing(value, everywhere, shape):
    p = nn.Parameter(torch.randn(shape))
    optimizer = subtrack([p], rank=3, update_proj_gap=1)
    step(optimizer, p, torch.randn(shape))
    step(optimizer, p, torch.randn(shape))
    before = optimizer.state[p]["projector"].clone()
    grad = torch.full(shape, value)
    if not everywhere and value:
        grad = torch.randn(shape)
        grad[3, 2] = value
    step(optimizer, p, grad)
    assert torch.equal(optimizer.state[p]["projector"], before)
    assert optimizer.refresh_counts() == {"0": 2}
    step(optimizer, p, torch.randn(shape))
    assert not torch.equal(optimizer.state[p]["projector"], before)
    assert all(
        t.isfinite().all() for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)
    )
    assert p.isfinite().all()


@pytest.mark.parametrize("rank", [2, 7, 99])
@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_what_is_stationary_stays_bit_for_bit(rank, moments):
    """A gradient that has no more directions than there are, and one of full rank."""
    grad = torch.randn(12, 2) @ torch.randn(2, 7)
    p = nn.Parameter(torch.zeros(12, 7))
    optimizer = subtrack([p], rank=rank, update_proj_gap=1, moments=moments)
    step(optimizer, p, grad)
    before = optimizer.state[p]["projector"].clone()
    for size in (1.0, 3.0, 1e-3):
        step(optimizer, p, size * grad)
    assert torch.equal(optimizer.state[p]["projector"], before)
    assert optimizer.refresh_counts() == {"0": 1}
    assert optimizer.state[p]["moments_start"] == 0


@pytest.mark.parametrize("bits", [8, 4])
@shapes
def test_a_direction_lost_to_rounding_is_found_anew(bits, shape):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = subtrack([p], rank=3, update_proj_gap=2, projector_bits=bits)
    step(optimizer, p, torch.randn(shape))
    state, group = optimizer.state[p], optimizer.param_groups[0]
    poor = _projector.load_basis(state, shape, group).clone()
    poor[:, 1] = 0.0
    _projector.store_basis(state, poor, group)
    step(optimizer, p, torch.randn(shape))  # between two turns
    before = basis_of(optimizer, p)
    assert np.linalg.matrix_rank(before) == 2
    mean = state["exp_avg"].clone()
    step(optimizer, p, torch.full(shape, float("nan")))
    assert np.array_equal(basis_of(optimizer, p), before)
    assert torch.equal(state["exp_avg"], mean)
    step(optimizer, p, torch.randn(shape))
    step(optimizer, p, torch.randn(shape))
    assert np.linalg.svd(basis_of(optimizer, p))[1].min() > 0.7
    assert optimizer.refresh_counts() == {"0": 2}
    assert p.isfinite().all()


def test_moments_do_not_grow_with_rounded_bases():
    """Of gradients of norm one; columns of such bases are longer than one."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(6, 10))
    options = {"projector_bits": 4, "subspace_lr": 1e-3}
    optimizer = subtrack([p], rank=3, update_proj_gap=1, **options)
    for _ in range(250):
        grad = torch.randn(6, 10, generator=generator)
        step(optimizer, p, grad / grad.norm())
    assert 0.05 < float(optimizer.state[p]["exp_avg_sq"].sum()) < 0.3


# Whole steps


def transcription(w, grads, start, *, lr, betas, eps, decay, alpha, eta, gap, moments, recovery):
    """Algorithm 1 of the paper, with the moments of LDAdam, in float64; wide matrices."""
    basis, m, v, since, previous = start, 0.0, 0.0, 0, None
    for t, grad in enumerate(grads):
        if t and t % gap == 0:
            new = turned(grad, basis, eta)
            change, basis = new.T @ basis, new
            seen = t - since
            rule = moments[t // gap - 1]
            if rule == "rotate":
                first, second = (1 - beta**seen for beta in betas)
                mean, square = m / first, v / second
                v = second * np.abs((change**2) @ (square - mean**2) + (change @ mean) ** 2)
                m = change @ m
            elif rule == "reset":
                m, v, since = 0.0, 0.0, t
        r = basis.T @ grad
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r**2
        first, second = (1 - beta ** (t + 1 - since) for beta in betas)
        n = (m / first) / (np.sqrt(v / second) + eps)
        update = basis @ n
        if recovery:
            phi = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
            rest = (grad - basis @ r) * phi
            norm = np.linalg.norm(rest)
            limit = 1.0 if previous is None else max(norm / (previous + 1e-8), 1.01) / 1.01
            rest, previous = rest / limit, norm / limit
            update = update + rest
        w = w * (1 - lr * decay) - lr * alpha * update
    return w, m, v, basis


@shapes
@pytest.mark.parametrize("eta", [None, 0.01])
@pytest.mark.parametrize(
    "moments", [2 * ["rotate"], 2 * ["keep"], 2 * ["reset"], ["reset", "rotate"]]
)
@pytest.mark.parametrize("recovery", [True, False])
def test_steps_are_the_papers(shape, eta, moments, recovery):
    generator = np.random.default_rng(3)
    grads = [f * generator.standard_normal(shape) for f in np.linspace(0.5, 2, 8)]
    grads = [g.astype(np.float32).astype(np.float64) for g in grads]
    w = generator.standard_normal(shape)
    numbers = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 0.01}
    p = nn.Parameter(torch.tensor(w).float())
    optimizer = SubTrack(
        [p], **numbers, weight_decay=0.5, rank=2, update_proj_gap=3, scale=0.25,
        subspace_lr=eta, recovery=recovery,
    )  # fmt: skip
    for i, grad in enumerate(grads):
        optimizer.param_groups[0]["moments"] = moments[max(i // 3 - 1, 0)]
        step(optimizer, p, grad)
        if not i:
            start = basis_of(optimizer, p)
    side = (lambda x: x) if shape[0] < shape[1] else (lambda x: x.T)
    want, m, v, basis = transcription(
        side(w), [side(g) for g in grads], start, **numbers, decay=0.5, alpha=0.25,
        eta=eta, gap=3, moments=moments, recovery=recovery,
    )  # fmt: skip
    moved = np.linalg.norm(want - side(w))
    state = optimizer.state[p]
    assert np.linalg.norm(side(p.detach().numpy()) - want) < 1e-5 * moved
    np.testing.assert_allclose(basis_of(optimizer, p), basis, atol=1e-5)
    np.testing.assert_allclose(side(state["exp_avg"].numpy()), m, atol=1e-5)
    np.testing.assert_allclose(side(state["exp_avg_sq"].numpy()), v, atol=1e-5)
    assert optimizer.refresh_counts() == {"0": 3}


def test_options_differ():
    """What the comparison above would not notice if they were all the same."""
    results = []
    for options in (
        {},
        {"moments": "keep"},
        {"moments": "reset"},
        {"recovery": False},
        {"reference": True},
        {"subspace_lr": 0.0},
    ):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(12, 7))
        optimizer = subtrack([p], rank=2, lr=1e-2, update_proj_gap=2, **options)
        for _ in range(6):
            step(optimizer, p, torch.randn(12, 7))
        results.append(p.detach())
    for i, a in enumerate(results):
        for b in results[:i]:
            assert float((a - b).norm()) > 0.02 * float(a.norm())


@shapes
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_subspace_that_stays_is_firas(shape, reference, bits):
    """Bit for bit."""
    results = []
    for make, own in (
        (SubTrack, {"subspace_lr": 0.0, "update_proj_gap": 2}),
        (gradpress.optim.Fira, {"update_proj_gap": 99}),
    ):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.ones(shape))
        optimizer = make([p], rank=3, reference=reference, projector_bits=bits, **own)
        for _ in range(7):
            step(optimizer, p, torch.randn(shape, generator=generator))
        results.append(p.detach())
    assert torch.equal(*results)


def test_without_recovery_a_subspace_that_stays_is_galores():
    results = []
    for make, own in (
        (SubTrack, {"subspace_lr": 0.0, "update_proj_gap": 2, "recovery": False}),
        (gradpress.optim.GaLoreAdamW, {"update_proj_gap": 99}),
    ):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.ones(9, 12))
        optimizer = make([p], rank=3, **own)
        for _ in range(5):
            step(optimizer, p, torch.randn(9, 12, generator=generator))
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("recovery", [True, False])
def test_a_scaled_gradient_turns_as_far(recovery):
    """And a step that the scaler skips changes nothing."""
    results = []
    for factor in (1.0, 1024.0):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.ones(9, 12))
        optimizer = subtrack([p], rank=3, update_proj_gap=1, subspace_lr=0.01, recovery=recovery)
        for _ in range(4):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(factor), torch.tensor(0.0)
            step(optimizer, p, factor * torch.randn(9, 12, generator=generator))
        results.append((p.detach(), optimizer.state[p]["projector"]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    state, weights = copy.deepcopy(optimizer.state[p]), p.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)
    step(optimizer, p, torch.randn(9, 12))
    assert torch.equal(p, weights)
    assert state.keys() == optimizer.state[p].keys()
    for name, value in state.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[p][name]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subspace_lr": 0.01, "moments": "reset", "state_bits": 8},
        {"projector_bits": 8, "state_bits": 4, "recovery": False},
        {"projector_bits": 4, "reference": True, "stagger": True},
    ],
)
def test_resume_in_the_middle_of_an_interval(options):
    def fresh():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(s).bfloat16()) for s in ((12, 20), (20, 12), (9,))]
        options_here = {"rank": 4, "update_proj_gap": 4, "min_8bit_size": 1, **options}
        return params, subtrack(params, lr=1e-2, **options_here)

    def run(params, optimizer, first, last):
        for i in range(first, last):
            generator = torch.Generator().manual_seed(i)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            optimizer.step()

    params, optimizer = fresh()
    run(params, optimizer, 0, 10)
    buffer = io.BytesIO()
    torch.save([params, optimizer.state_dict()], buffer)
    run(params, optimizer, 10, 17)
    buffer.seek(0)
    loaded, state = torch.load(buffer, weights_only=True)
    others, restored = fresh()
    for p, value in zip(others, loaded, strict=True):
        p.data.copy_(value)
    restored.load_state_dict(state)
    run(others, restored, 10, 17)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert type(value) in (torch.Tensor, int, float)
            other = restored.state[q][name]
            assert torch.equal(
                torch.as_tensor(value).nan_to_num(), torch.as_tensor(other).nan_to_num()
            ), name


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
@pytest.mark.parametrize("options", [{}, {"projector_bits": 4, "state_bits": 8}])
def test_same_bits_for_all_threads(shape, options, restore_threads):
    results = []
    for threads in (1, 4):
        torch.set_num_threads(1)
        p = nn.Parameter(torch.zeros(shape))
        optimizer = subtrack([p], rank=16, update_proj_gap=1, **options)
        for t in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        results.append(p.detach())
    assert torch.equal(*results)
    assert float(results[0].norm()) > 0


def test_random_numbers_do_not_come_again_after_a_reset():
    """Steps that Adam counts alike round a bfloat16 weight each in its own way."""
    grad = torch.randn(40, 30).bfloat16()
    results = []
    for before in (0, 0, 200):
        p = nn.Parameter(torch.ones(40, 30).bfloat16())
        optimizer = subtrack([p], lr=0.0, rank=4, subspace_lr=0.0)
        p.grad = grad
        optimizer.step()  # finds the subspace alone
        state, group = optimizer.state[p], optimizer.param_groups[0]
        for name in ("exp_avg", "exp_avg_sq", "update_norm"):
            state[name].zero_()
        state["step"].fill_(before)
        state["moments_start"], group["lr"] = before, 0.01
        optimizer.step()
        results.append(p.detach().float())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    # At most one step of the grid below 2 apart.
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=2**-7)


def test_tensors_of_higher_order_are_matrices():
    grads = [torch.randn(6, 2, 2, 3) for _ in range(4)]
    results = []
    for shape in ((6, 2, 2, 3), (6, 12)):
        p = nn.Parameter(torch.ones(shape))
        optimizer = subtrack([p], rank=2, update_proj_gap=2)
        for grad in grads:
            step(optimizer, p, grad.view(shape))
        results.append(p.detach().view(6, 12))
        assert optimizer.refresh_counts() == {"0": 2}
    assert torch.equal(*results)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_train(bits):
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(32, 24, bias=False)), bits=bits)
    teacher = torch.randn(24, 32) / 6
    optimizer = subtrack(model.parameters(), rank=8, lr=5e-3, update_proj_gap=5, scale=1.0)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 32)
        loss = (model(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:3])


@pytest.mark.parametrize(
    "options",
    [{}, {"projector_bits": 4, "state_bits": 8}, {"recovery": False, "state_bits": 4}],
)
def test_memory_is_as_planned_and_firas(options):
    def run(make, **own):
        torch.manual_seed(0)
        model = nn.Linear(32, 48)
        groups = gradpress.optim.param_groups(model, rank=8, verbose=False)
        optimizer = make(groups, min_8bit_size=1, **own)
        planned = gradpress.memory.plan(model, optimizer)
        model(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
        counted = gradpress.memory.count(model, optimizer)
        return tuple(
            {k: m.by_category[k] for k in ("optimizer_states", "projectors")}
            for m in (planned, counted)
        )

    ours = run(SubTrack, **options)
    assert ours[0] == ours[1]
    options.pop("recovery", None)
    assert ours == run(gradpress.optim.Fira, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subspace_lr": -1.0}, "Invalid subspace_lr value: -1.0"),
        ({"subspace_lr": math.inf}, "Invalid subspace_lr value: inf"),
        ({"subspace_lr": math.nan}, "Invalid subspace_lr value: nan"),
        ({"moments": "turn"}, "Invalid moments value: 'turn'"),
        ({"recovery": False, "reference": True}, "Invalid reference value: True"),
        ({"norm_growth": 0.9}, "Invalid norm_growth value: 0.9"),
        ({"proj_type": "left"}, "Invalid proj_type value: 'left'"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        subtrack([nn.Parameter(torch.ones(2, 2))], **options)
