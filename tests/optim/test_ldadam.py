"""LDAdam: a subspace that moves at every step, moments that follow, and error feedback."""

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradpress
from gradpress.optim import _feedback as feedback
from gradpress.optim import _power_iteration as iteration
from gradpress.optim._moving_moments import load_rows
from gradpress.optim._scaling import Scale
from gradpress.optim.ldadam import LDAdamW

SHAPES = [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1), (40, 600), (600, 40)]
shapes = pytest.mark.parametrize("shape", SHAPES)
BITS = [32, 16, 8, 4]


def ldadam(params, **options):
    return LDAdamW(params, **{"error_bits": 32, **options})


def transcription(w, grads, basis, *, lr, betas, eps, decay, rho, scale=1.0, feedback=True):
    """Algorithm 1 of the paper in float64; the first basis is the library's.

    Returns what there is after each step: weights, feedback, basis.
    """
    wide = w.shape[0] < w.shape[1]
    w = w if wide else w.T
    b1, b2 = betas
    m = v = np.zeros((basis.shape[1], w.shape[1]))
    e, history = np.zeros_like(w), []
    for c, grad in enumerate(grads):
        g = (grad if wide else grad.T) + e
        p, kept = basis, m
        if c:
            mean, square = m / (1 - b1**c), v / (1 - b2**c)
            b = rho * basis @ mean + (1 - rho) * g
            p, _ = np.linalg.qr(b @ (b.T @ basis))
            turn = p.T @ basis
            kept = turn @ m
            v = (1 - b2**c) * abs((turn**2) @ (square - mean**2) + (turn @ mean) ** 2)
        r = p.T @ g
        if feedback:
            e = g - p @ r + b1 / (1 - b1) * (basis @ m - p @ kept)
        m, v, basis = b1 * kept + (1 - b1) * r, b2 * v + (1 - b2) * r**2, p
        n = (m / (1 - b1 ** (c + 1))) / (np.sqrt(v / (1 - b2 ** (c + 1))) + eps)
        w = (1 - lr * decay) * w - lr * scale * p @ n
        history.append((w if wide else w.T, e if wide else e.T, basis))
    return history


def check_steps(shape, rank, seed, *, feedback=True, maximize=False, betas=(0.8, 0.9), rho=0.9):
    generator = np.random.default_rng(seed)
    drift = generator.standard_normal(shape)
    grads = [drift + generator.standard_normal(shape) for _ in range(7)]
    grads = [g.astype(np.float32) for g in grads]
    w = generator.standard_normal(shape)
    numbers = {"lr": 0.02, "betas": betas, "eps": 0.01, "rho": rho, "scale": 0.7}
    p = nn.Parameter(torch.tensor(w).float())
    optimizer = ldadam(
        [p], **numbers, weight_decay=0.5, rank=rank, error_feedback=feedback, maximize=maximize
    )
    results = []
    for g in grads:
        p.grad = torch.tensor(-g if maximize else g)
        optimizer.step()
        state = optimizer.state[p]
        error = state["error"] if feedback else torch.zeros(shape)
        results.append([t.detach().double().numpy().copy() for t in (p, error, state["projector"])])
    want = transcription(w, grads, results[0][2], **numbers, decay=0.5, feedback=feedback)
    size = max(np.linalg.norm(e) for _, e, _ in want) + np.linalg.norm(drift)
    for (got_w, got_e, got_p), (want_w, want_e, want_p) in zip(results, want, strict=True):
        # Float32 arithmetic, through products whose conditions multiply.
        assert np.linalg.norm(got_w - want_w) < 2e-5 * np.linalg.norm(want_w - w)
        assert np.linalg.norm(got_e - want_e) < 2e-5 * size
        assert np.linalg.norm(got_p @ got_p.T - want_p @ want_p.T) < 2e-5 * math.sqrt(rank)
    assert optimizer.refresh_counts() == {"0": 7}


@shapes
@pytest.mark.parametrize("error_feedback", [True, False])
def test_steps_are_the_papers(shape, error_feedback):
    check_steps(shape, min(3, *shape), 0, feedback=error_feedback)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_steps_are_the_papers_whatever_the_shape(rows, columns, rank, seed, maximize):
    check_steps((rows, columns), min(rank, rows, columns), seed, maximize=maximize)


@shapes
@pytest.mark.parametrize("gap", [1, 3])
def test_nothing_is_lost(shape, gap):
    """What the moments hold and what the feedback holds add up to what they would without ranks."""
    beta = 0.9
    p = nn.Parameter(torch.zeros(shape))
    optimizer = ldadam([p], rank=2, betas=(beta, 0.99), update_proj_gap=gap)
    generator = torch.Generator().manual_seed(0)
    momentum, error = np.zeros(shape), np.zeros(shape)
    for _ in range(9):
        p.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        state = optimizer.state[p]
        want = beta * momentum + (1 - beta) * (p.grad.double().numpy() + error)
        basis, mean = (state[name].double().numpy() for name in ("projector", "exp_avg"))
        momentum = basis @ mean if shape[0] < shape[1] else mean @ basis.T
        error = state["error"].double().numpy()
        got = momentum + (1 - beta) * error
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
        if min(shape) > 2:
            assert np.linalg.norm(error) > 0.1 * np.linalg.norm(momentum)


@shapes
def test_full_rank_leaves_no_error_and_is_momentum(shape):
    """With a linear rule the subspace does not matter where it is everything."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    p = nn.Parameter(start.clone())
    beta, lr, eps = 0.8, 1e4, 1e6
    optimizer = ldadam([p], rank=99, lr=lr, eps=eps, betas=(beta, 0.9))
    weights, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for t in range(1, 8):
        # Depends on the parameters, so that an error would go on growing.
        p.grad = torch.sin(3 * p.detach())
        momentum = beta * momentum + (1 - beta) * torch.sin(3 * weights)
        weights = weights - lr / eps * momentum / (1 - beta**t)
        optimizer.step()
        assert float(optimizer.state[p]["error"].norm()) < 1e-5 * float(p.grad.norm())
    assert float((p.detach() - weights).norm()) < 1e-4 * float((weights - start).norm())


@shapes
def test_full_rank_in_a_subspace_that_stays_is_adam_in_other_coordinates(shape):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    start = p.detach().double()
    optimizer = ldadam([p], rank=99, lr=1e-2, update_proj_gap=1000)
    wide = shape[0] < shape[1]
    grads = [torch.randn(shape) for _ in range(6)]
    for grad in grads:
        p.grad = grad
        optimizer.step()
    basis = optimizer.state[p]["projector"].double()

    def turn(x):
        return basis.T @ x if wide else x @ basis

    def back(x):
        return basis @ x if wide else x @ basis.T

    q = nn.Parameter(turn(start))
    adam = torch.optim.Adam([q], lr=1e-2, betas=(0.908, 0.99))
    for grad in grads:
        q.grad = turn(grad.double())
        adam.step()
    moved = float((p.detach() - start).norm())
    assert float((p.detach() - back(q.detach())).norm()) < 1e-5 * moved


# Subspaces


def lag(make, shape, angle, steps=60, rank=3, **options):
    """How much of a gradient of low rank that turns slowly is outside of the subspace, at most."""
    generator = np.random.default_rng(0)
    skew = generator.standard_normal((shape[0], shape[0]))
    turn = scipy.linalg.expm(angle * (skew - skew.T) / np.linalg.norm(skew - skew.T, 2))
    left, right = (np.linalg.qr(generator.standard_normal((n, rank)))[0] for n in shape)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = make([p], rank=rank, lr=1e-2, **options)
    outside = []
    for _ in range(steps):
        grad = (left * [3, 2, 1]) @ right.T
        left = turn @ left
        p.grad = torch.tensor(grad).float()
        optimizer.step()
        basis = optimizer.state[p]["projector"].double().numpy()
        outside.append(np.linalg.norm(grad - basis @ (basis.T @ grad)) / np.linalg.norm(grad))
    return max(outside[10:])


@pytest.mark.parametrize("error_feedback", [True, False])
def test_the_subspace_follows_a_gradient_that_turns(error_feedback):
    """By 0.01 a step; GaLore's, for want of a refresh, is left behind four times as far."""
    assert lag(ldadam, (20, 30), 0.01, error_feedback=error_feedback) < 0.08
    assert lag(ldadam, (20, 30), 0.05, error_feedback=error_feedback) < 0.35
    assert lag(gradpress.optim.GaLoreAdamW, (20, 30), 0.01, update_proj_gap=1000) > 0.3


@pytest.mark.parametrize(("beta1", "rho"), [(0.908, 0.7), (0.8, 0.5), (0.95, 0.85)])
def test_a_rho_too_small_for_the_feedback_is_told(beta1, rho):
    with pytest.warns(UserWarning, match=rf"rho {rho} is not above 0\.\d+, .* beta1 of {beta1}"):
        assert lag(ldadam, (20, 30), 0.01, betas=(beta1, 0.99), rho=rho) > 0.3
    stable = (3 * beta1 - 1) / (3 - beta1) + 0.03
    assert lag(ldadam, (20, 30), 0.01, betas=(beta1, 0.99), rho=stable) < 0.15
    assert lag(ldadam, (20, 30), 0.01, betas=(beta1, 0.99), rho=rho, error_feedback=False) < 0.1


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_bases_stay_orthonormal(shape):
    """Through jumps, tiny and huge gradients, and gradients of too small a rank."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = ldadam([p], rank=8, error_feedback=False)
    for t in range(300):
        grad = torch.randn(shape, generator=generator)
        if t % 3 == 1:
            grad = grad[:, :1] * grad[:1]
        p.grad = grad * 10.0 ** (t // 10 % 25 - 12)
        optimizer.step()
        if t % 10 == 9:
            basis = optimizer.state[p]["projector"].double()
            assert float((basis.T @ basis - torch.eye(8)).abs().max()) < 1e-5
    assert optimizer.refresh_counts() == {"0": 300}


def test_directions_in_which_there_is_nothing_stay():
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(12, 20))
    optimizer = ldadam([p], rank=4, rho=0.0, error_feedback=False)
    p.grad = torch.randn(12, 20, generator=generator)
    optimizer.step()
    old = optimizer.state[p]["projector"].clone()
    u = torch.nn.functional.normalize(torch.randn(12, 1, generator=generator), dim=0)
    p.grad = u * torch.randn(1, 20, generator=generator)
    optimizer.step()
    new = optimizer.state[p]["projector"]
    span = torch.linalg.qr(torch.cat((old, u), dim=1))[0]
    torch.testing.assert_close(span @ (span.T @ new), new, rtol=0, atol=2e-2)
    torch.testing.assert_close(new @ (new.T @ u), u, rtol=0, atol=1e-4)
    # Of the old subspace all is kept that is not along the new direction.
    rest = old - u @ (u.T @ old)
    kept = torch.linalg.svd(rest)[0][:, :3]
    assert float((kept - new @ (new.T @ kept)).norm()) < 0.1


@given(st.integers(1, 40), st.integers(0, 60), st.floats(0, 6), st.integers(0, 999), st.booleans())
def test_rows_become_those_of_a_qr_decomposition(rank, more, decades, seed, library):
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((rank + more, rank)))[0]
    right = np.linalg.qr(generator.standard_normal((rank, rank)))[0]
    y = (left * 10 ** -np.linspace(0, decades, rank)) @ right.T
    eliminate = iteration._eliminate
    if library:  # what devices take
        iteration._eliminate = lambda matrix, smallest: iteration._solve(matrix)
    try:
        rows, good = iteration.orthonormal_rows(torch.tensor(y.T).float())
    finally:
        iteration._eliminate = eliminate
    assert bool(good)
    got = rows.double().numpy()
    assert np.abs(got @ got.T - np.eye(rank)).max() < 2e-6
    q, r = np.linalg.qr(y)
    want = q * np.sign(np.diag(r))
    # The input's own rounding to float32, times its condition.
    assert np.abs(got.T - want).max() < 1e-5 + 3e-8 * 10**decades


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("bits", [{}, {"error_bits": 8, "projector_bits": 8, "state_bits": 8}])
def test_same_bits_for_all_threads_where_sums_are_long(shape, bits, restore_threads):
    results = []
    for threads in (1, 4):
        torch.set_num_threads(1)
        p = nn.Parameter(torch.zeros(shape))
        optimizer = ldadam([p], rank=16, **{"error_bits": 16, **bits})
        for t in range(4):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        results.append({"p": p.detach(), **optimizer.state[p]})
    for name, value in results[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(results[1][name])), name
    assert float(results[0]["p"].norm()) > 0


def test_the_basis_stays_between_moves():
    p = nn.Parameter(torch.zeros(10, 14))
    optimizer = ldadam([p], rank=3, update_proj_gap=3)
    at, old = [], torch.zeros(10, 3)
    for t in range(8):
        p.grad = torch.randn(10, 14)
        optimizer.step()
        if not torch.equal(optimizer.state[p]["projector"], old):
            at.append(t)
        old = optimizer.state[p]["projector"].clone()
    assert at == [0, 3, 6]
    assert optimizer.refresh_counts() == {"0": 3}


# Feedback


@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_is_right_on_average(bits):
    """And rounded by half a step of its format at most, on the whole."""
    p = torch.zeros(8, 64)
    group = {"error_bits": bits, "error_group_size": 64, "seed": 7}
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    state = {"step": torch.tensor(0.0), "tensor_id": 3}
    feedback.new_error(state, p, group)
    assert torch.equal(feedback._load_error(p, state, group), p)
    total, draws = torch.zeros(8, 64, dtype=torch.float64), 400
    for _ in range(draws):
        state["step"] += 1
        feedback.store_error(state, values, group, None)
        loaded = feedback._load_error(p, state, group)
        total += loaded
    largest = values.abs().amax(dim=1, keepdim=True)
    step = {32: 0.0 * largest, 16: values.abs() * 2.0**-7, 8: largest / 127, 4: largest / 7}[bits]
    assert bool(((loaded - values).abs() <= step * (1 + 1e-5)).all())
    # Five standard deviations of the mean of what is at most a step from one end to the other.
    assert bool(((total / draws - values).abs() <= 2.5 * step / draws**0.5 + 1e-7).all())
    before = {name: t.clone() for name, t in state.items() if name in feedback.KEEP}
    feedback.store_error(state, 2 * values, group, torch.ones(1))
    assert all(torch.equal(t, state[name]) for name, t in before.items())


def test_a_poisoned_element_keeps_its_feedback():
    p = torch.zeros(2, 4)
    for bits in BITS:
        group = {"error_bits": bits, "error_group_size": 4, "seed": 0}
        state = {"step": torch.tensor(1.0), "tensor_id": 0}
        feedback.new_error(state, p, group)
        feedback.store_error(state, torch.full((2, 4), 2.0), group, None)
        values = torch.full((2, 4), 2.0)
        values[0, 1], values[1, 2] = float("nan"), float("inf")
        feedback.store_error(state, values, group, None)
        torch.testing.assert_close(feedback._load_error(p, state, group), torch.full((2, 4), 2.0))


@pytest.mark.parametrize(("bits", "near"), [(16, 0.02), (8, 0.1), (4, 0.8)])
def test_feedback_of_few_bits_stays_near(bits, near):
    results = []
    for error_bits in (32, bits):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.zeros(40, 64))
        optimizer = ldadam([p], lr=1e-2, rank=8, error_bits=error_bits)
        drift = torch.randn(40, 64, generator=generator)
        for _ in range(30):
            p.grad = drift + torch.randn(40, 64, generator=generator)
            optimizer.step()
        results.append(p.detach())
    assert 0 < float((results[0] - results[1]).norm()) < near * float(results[0].norm())


@pytest.mark.parametrize(
    ("options", "per_element"),
    [
        ({"error_bits": 32}, 4.0),
        ({"error_bits": 16}, 2.0),
        ({}, 1 + 4 / 256),
        ({"error_bits": 4, "error_group_size": 64}, 0.5 + 4 / 64),
        ({"error_feedback": False}, 0.0),
    ],
)
def test_bytes_are_those_of_the_documentation(options, per_element):
    layer = nn.Linear(96, 64, bias=False)
    optimizer = LDAdamW(layer.parameters(), rank=4, **options)
    planned = gradpress.memory.plan(layer, optimizer).by_category
    layer.weight.grad = torch.randn(64, 96)
    optimizer.step()
    assert planned == gradpress.memory.count(layer, optimizer).by_category
    # Two moments, and the counter of steps.
    assert planned["optimizer_states"] == 2 * 4 * 4 * 96 + 4 + per_element * 64 * 96
    # A basis, its leading direction, how often it has moved, and what it captures.
    assert planned["projectors"] == 4 * (64 * 4 + 64) + 8 + 4


def test_gradients_are_not_written_and_steps_may_follow_each_other():
    """The original needs a backward pass between two steps."""
    grad = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    results = []
    for again in (False, True):
        p = nn.Parameter(torch.ones(9, 12))
        optimizer = LDAdamW([p], rank=2, lr=1e-2)
        p.grad = grad.clone()
        for _ in range(4):
            if again:
                optimizer.zero_grad()
                assert p.grad is None
                p.grad = grad.clone()
            optimizer.step()
            assert torch.equal(p.grad, grad)
        results.append(p.detach())
    assert torch.equal(*results)


def mlp():
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 20, bias=False), nn.LayerNorm(20)]
    return nn.Sequential(*layers)


def train(model, optimizer, first, last, scaler=None, clip=None):
    for i in range(first, last):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(i))
        loss = (model(x) - x.roll(1, 1)).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        model.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def two_groups(model, **options):
    return LDAdamW(gradpress.optim.param_groups(model, rank=4, verbose=False), lr=1e-2, **options)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_feedback_is_in_the_units_of_gradients_without_scale(clip):
    """With a scale that is a power of two not a bit differs, whether it changes or not."""
    plain = mlp()
    want = train(plain, two_groups(plain, error_bits=32), 0, 6, clip=clip)
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    got = train(model, two_groups(model, error_bits=32), 0, 6, scaler, clip)
    assert scaler.get_scale() == 8192.0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if clip else 0)


def test_stepping_during_the_backward_pass_is_the_same():
    results = []
    for fused in (False, True):
        model = mlp()
        optimizer = two_groups(model)
        if fused:
            gradpress.optim.fused_backward(model, optimizer)
        results.append(train(model, optimizer, 0, 5))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_resume_goes_on_bit_for_bit(bits):
    options = {"error_bits": bits, "projector_bits": 8 if bits < 16 else None}
    model = mlp().bfloat16().float()
    optimizer = two_groups(model, **options)
    train(model, optimizer, 0, 4)
    other = copy.deepcopy(model)
    restored = two_groups(other, **options)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours, theirs = train(model, optimizer, 4, 8), train(other, restored, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Gradients that say nothing


def stepped(shape=(6, 10), steps=3, **options):
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(9)))
    optimizer = ldadam([p], rank=3, lr=1e-2, **options)
    for t in range(steps):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    return p, optimizer


def tensors(p, optimizer):
    state = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    return {"p": p.detach().clone(), **state}


@pytest.mark.parametrize("bits", [{}, {"error_bits": 8, "state_bits": 8, "min_8bit_size": 1}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_gradients_change_nothing(bits, value):
    p, optimizer = stepped(**bits)
    before = tensors(p, optimizer)
    p.grad = torch.full((6, 10), value)
    optimizer.step()
    after = tensors(p, optimizer)
    assert before.pop("step") == after.pop("step") - 1
    for name, t in before.items():
        if name in ("error_codes", "error_scale"):  # rounded anew
            continue
        torch.testing.assert_close(after[name], t, rtol=0, atol=0, msg=name)
    assert optimizer.nonfinite_gradients == 30  # of the projected ones
    p.grad = torch.ones(6, 10)
    optimizer.step()
    assert all(bool(t.isfinite().all()) for t in tensors(p, optimizer).values())
    assert not torch.equal(p, before["p"])


def test_one_poisoned_element_leaves_the_rest_of_its_column_for_later():
    p, optimizer = stepped()
    before = tensors(p, optimizer)
    grad = torch.randn(6, 10)
    p.grad = grad.clone()
    p.grad[2, 4] = float("nan")
    optimizer.step()
    after = tensors(p, optimizer)
    assert torch.equal(after["projector"], before["projector"])
    changed = (after["p"] != before["p"]).any(dim=0)
    assert changed.tolist() == [j != 4 for j in range(10)]
    want = before["error"][:, 4] + grad[:, 4]
    want[2] = before["error"][2, 4]
    torch.testing.assert_close(after["error"][:, 4], want)


def test_a_zero_gradient_keeps_the_basis():
    p, optimizer = stepped(error_feedback=False)
    before = tensors(p, optimizer)
    p.grad = torch.zeros(6, 10)
    optimizer.step()
    after = tensors(p, optimizer)
    assert torch.equal(after["projector"], before["projector"])
    torch.testing.assert_close(after["exp_avg"], 0.908 * before["exp_avg"])
    assert after["projector_refreshes"] == before["projector_refreshes"] == 3


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_start_without_a_gradient_is_made_good(value):
    p = nn.Parameter(torch.zeros(6, 10))
    optimizer = ldadam([p], rank=2, lr=1e-2)
    p.grad = torch.full((6, 10), value)
    optimizer.step()
    assert not bool(p.any())
    grad = torch.outer(torch.randn(6), torch.randn(10))
    p.grad = grad.clone()
    optimizer.step()
    basis = optimizer.state[p]["projector"]
    torch.testing.assert_close(basis @ (basis.T @ grad), grad, rtol=0, atol=1e-5)
    assert float(optimizer.state[p]["error"].norm()) < 1e-5
    assert bool(p.all())


@pytest.mark.parametrize("bits", [{}, {"error_bits": 4, "state_bits": 8, "projector_bits": 8}])
@pytest.mark.parametrize("steps", [0, 3])
def test_flags_of_a_scaler_may_stay_on_the_device(bits, steps):
    """As tensors that only the kernels look at."""
    options = {**bits, "min_8bit_size": 1}
    (p, ours), (q, plain) = stepped(steps=steps, **options), stepped(steps=steps, **options)
    group = ours.param_groups[0]
    if not steps:  # a state with a basis still to be found
        p.grad = torch.full((6, 10), float("inf"))
        scale = Scale(1.0, torch.tensor([256.0]), torch.ones(1))
        ours._step_group(group, [p], scale)
        assert torch.equal(p, q)
        assert ours.state[p]["projector_ready"] == 0
        ours.state[p]["step"] -= 1
    before = tensors(p, ours)
    grad = torch.randn(6, 10)
    if steps:
        p.grad = torch.full((6, 10), float("inf"))
        scale = Scale(1.0, torch.tensor([256.0]), torch.ones(1))
        ours._step_group(group, [p], scale)
        ours.state[p]["step"] -= 1
        for name, t in tensors(p, ours).items():
            assert torch.equal(t, before[name]), name
    p.grad, q.grad = 256 * grad, grad
    ours._step_group(group, [p], Scale(1.0, torch.tensor([256.0]), torch.zeros(1)))
    plain.step()
    for name, t in tensors(q, plain).items():
        torch.testing.assert_close(tensors(p, ours)[name], t, rtol=0, atol=0, msg=name)


# Weights and moments of few bits


@pytest.mark.parametrize(
    ("bits", "near", "alike"),
    [
        ({"state_bits": 8}, 0.1, 0.02),
        ({"projector_bits": 8}, 0.1, 0.02),
        ({"projector_bits": 4}, 0.5, 0.2),
    ],
)
def test_moments_and_bases_of_few_bits_stay_near(bits, near, alike):
    """Second moments do not grow with bases that are longer than they should be."""
    weights, squares = [], []
    for options in ({}, bits):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.zeros(40, 64))
        own = {"rank": 8, "betas": (0.908, 0.999), "min_8bit_size": 1, **options}
        optimizer = ldadam([p], lr=1e-2, **own)
        drift = torch.randn(40, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
        for _ in range(80):
            p.grad = drift + torch.randn(40, 64, generator=generator)
            optimizer.step()
        weights.append(p.detach())
        moments = load_rows(optimizer.state[p], (40, 64), optimizer.param_groups[0])
        squares.append(float(moments["exp_avg_sq"].mean()))
    assert 0 < float((weights[0] - weights[1]).norm()) < near * float(weights[0].norm())
    assert squares[1] == pytest.approx(squares[0], rel=alike)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_train(bits):
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(32, 24, bias=False)), bits=bits)
    teacher = torch.randn(24, 32) / 6
    optimizer = LDAdamW(model.parameters(), rank=8, lr=5e-3)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 32)
        loss = (model(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:3])


def test_feedback_trains_what_the_rank_leaves_out():
    """A target of full rank, by rank one: without feedback the rest comes late or not at all."""
    target = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for error_feedback in (True, False):
        p = nn.Parameter(torch.zeros(12, 16))
        optimizer = ldadam([p], rank=1, lr=0.05, error_feedback=error_feedback)
        for _ in range(300):
            p.grad = p.detach() - target
            optimizer.step()
        losses.append(float((p.detach() - target).square().mean()))
    assert losses[0] < 0.5 * losses[1]


def test_ranks_may_be_chosen_from_the_gradient():
    p = nn.Parameter(torch.zeros(20, 30))
    optimizer = ldadam([p], rank="auto", rank_energy=0.999)
    grad = torch.randn(20, 4) @ torch.randn(4, 30)
    for _ in range(3):
        p.grad = grad.clone()
        optimizer.step()
    assert optimizer.report().rows[0].rank == 4
    assert optimizer.state[p]["error"].shape == (20, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 1.0}, "Invalid rho value: 1.0"),
        ({"rho": -0.1}, "Invalid rho value: -0.1"),
        ({"error_bits": 2}, "Invalid error_bits value: 2"),
        ({"error_group_size": 0}, "Invalid error_group_size value: 0"),
        ({"proj_type": "left"}, "Invalid proj_type value: 'left'"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        LDAdamW([nn.Parameter(torch.ones(2, 2))], **options)
