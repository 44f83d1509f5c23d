"""GaLoreAdafactor: factored moments in subspaces, relative steps, moments that turn."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import adafactor as reference
from torch import nn

from gradpress.ops import lowrank as kernels
from gradpress.optim import _adafactor as parts
from gradpress.optim import _base
from gradpress.optim import _projector as projector
from gradpress.optim._moments import Turn
from gradpress.optim._tucker import ModeTurns
from gradpress.optim.galore_adafactor import GaLoreAdafactor

TYPES = ["std", "reverse_std", "left", "right", "full"]
types = pytest.mark.parametrize("proj_type", TYPES)
shapes = pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
#: A fixed rate, as the published runs have it.
FIXED = {"lr": 1e-2, "relative_step": False, "scale_parameter": False}


def projected(params, **options):
    return GaLoreAdafactor(params, **{"rank": 3, "scale": 1.0, **FIXED, **options})


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_moved_alike(ours, want, start):
    """Float32 arithmetic over a few steps: a few units in its sixth place of what moved.

    The weight itself is rounded too, to 6e-8 of its size at every step.
    """
    moved = np.linalg.norm(want - start)
    error = np.linalg.norm(ours.detach().double().numpy() - want)
    assert moved > 0
    assert error < 1e-5 * moved + 3e-7 * np.linalg.norm(want)


# The rule, without a projection

options_of_adafactor = st.fixed_dictionaries(
    {
        "beta1": st.sampled_from([None, 0.0, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.3]),
        "clip_threshold": st.sampled_from([0.4, 1.0, 5.0]),
        "decay_rate": st.sampled_from([-0.8, -0.5]),
        "scale_parameter": st.booleans(),
        "eps": st.sampled_from([(1e-30, 1e-3), (1e-2, 0.5)]),
    }
)
rates = st.sampled_from(
    [
        {"lr": 0.02, "relative_step": False},
        {"relative_step": True},
        {"relative_step": True, "warmup_init": True},
    ]
)
sizes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@given(shape=sizes, options=options_of_adafactor, rate=rates, maximize=st.booleans())
def test_unprojected_steps_are_the_papers(shape, options, rate, maximize):
    generator = np.random.default_rng(len(shape))
    w = generator.standard_normal(shape)
    p = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    optimizer = GaLoreAdafactor([p], **options, **rate, maximize=maximize)
    want = reference.Adafactor(w, **options, **rate, maximize=maximize)
    for t in range(5):
        # Clipped from the second step on, where gradients grow.
        g = ((1 + t) * generator.standard_normal(shape)).astype(np.float32)
        p.grad = torch.tensor(g)
        optimizer.step()
        want.step(g)
    assert_moved_alike(p, want.w, w)


@pytest.mark.parametrize("shape", [(), (5,), (6, 4), (2, 3, 4), (3, 2, 2, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"warmup_init": True, "beta1": 0.9},
        {"weight_decay": 0.2, "clip_threshold": 0.5},
        {"lr": 0.03, "relative_step": False, "beta1": 0.5, "weight_decay": 0.1},
        {**FIXED, "weight_decay": 0.1, "decay_rate": -0.6},
    ],
)
def test_unprojected_steps_are_those_of_transformers(shape, options):
    """Whose arithmetic has the parameter's dtype, here float64."""
    from transformers.optimization import Adafactor

    start = noise(shape, 0).double()
    p, q = nn.Parameter(start.float()), nn.Parameter(start.clone())
    ours, theirs = GaLoreAdafactor([p], **options), Adafactor([q], **options)
    for t in range(6):
        p.grad = (1 + t) * noise(shape, t + 1)
        q.grad = p.grad.double()
        ours.step()
        theirs.step()
    assert_moved_alike(p, q.detach().numpy(), start.numpy())
    tensors = {n: v.shape for n, v in theirs.state[q].items() if torch.is_tensor(v) and n != "RMS"}
    assert {n: v.shape for n, v in ours.state[p].items() if torch.is_tensor(v)} == {
        **tensors,
        "step": torch.Size([]),
    }


@pytest.mark.parametrize("shape", [(), (5,), (6, 4), (2, 3, 4)])
def test_defaults_are_those_of_pytorch(shape):
    """The two agree without decay and momentum; there, `lr` is the cap on the relative step.

    Pytorch's decays by `lr` alone, has no momentum, and bounds second moments from below where the
    paper adds epsilon to squares: gradients far above it make no difference.
    """
    start = noise(shape, 0).double()
    p, q = nn.Parameter(start.float()), nn.Parameter(start.clone())
    ours = GaLoreAdafactor([p])
    theirs = torch.optim.Adafactor([q], lr=1e-2, weight_decay=0.0)
    for t in range(6):
        p.grad = (1 + t) * noise(shape, t + 1)
        q.grad = p.grad.double()
        ours.step()
        theirs.step()
    assert_moved_alike(p, q.detach().numpy(), start.numpy())


def test_relative_steps_fall_after_ten_thousand():
    steps = [1, 100, 10**4, 10**4 + 1, 10**6]
    rates = [parts.relative_rate(t, warmup_init=False) for t in steps]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, (10**4 + 1) ** -0.5, 1e-3])
    warm = [parts.relative_rate(t, warmup_init=True) for t in steps]
    assert warm == pytest.approx([1e-6, 1e-4, 1e-2, (10**4 + 1) ** -0.5, 1e-3])


# The rule, in subspaces


def bases_of(state, shape):
    """Left and right bases of a matrix, as the library keeps them."""
    short, long = (
        state[name].double().numpy().copy() if name in state else None
        for name in (projector.SHORT, projector.LONG)
    )
    return (long, short) if shape[0] >= shape[1] else (short, long)


@types
@shapes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta1": 0.9, "weight_decay": 0.4},
        {"beta1": 0.5, "scale_parameter": True, "weight_decay": 0.4, "maximize": True},
        {"lr": None, "relative_step": True, "scale_parameter": True, "weight_decay": 2.0},
    ],
)
def test_projected_steps_are_those_of_the_subspace(proj_type, shape, options):
    generator = np.random.default_rng(0)
    w = generator.standard_normal(shape)
    p = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    optimizer = projected([p], proj_type=proj_type, update_proj_gap=3, **{**options, "scale": 0.25})
    own = {"scale": 0.25, **FIXED, **options}
    want = reference.Adafactor(w, **own)
    for t in range(7):
        g = ((1 + t) * generator.standard_normal(shape)).astype(np.float32)
        p.grad = torch.tensor(g)
        optimizer.step()
        want.step(g, *bases_of(optimizer.state[p], shape))
    assert_moved_alike(p, want.w, w)
    assert optimizer.refresh_counts() == {"0": 3}


@types
def test_a_reset_begins_anew(proj_type):
    """The decay of the second moments too; the relative step size goes on."""
    shape = (8, 6)
    w = np.ones(shape)
    p = nn.Parameter(torch.ones(shape))
    options = {"beta1": 0.9, "relative_step": True, "lr": None}
    optimizer = projected([p], moments="reset", proj_type=proj_type, update_proj_gap=4, **options)
    want = reference.Adafactor(w, scale=1.0, **{**FIXED, **options})
    for t in range(6):
        g = noise(shape, t)
        p.grad = g
        optimizer.step()
        if t == 4:
            want.restart()
        want.step(g.numpy(), *bases_of(optimizer.state[p], shape))
    assert_moved_alike(p, want.w, w)
    assert optimizer.state[p]["moments_start"] == 4
    assert float(optimizer.state[p]["step"]) == 6


@types
@pytest.mark.parametrize("state_bits", [32, 8])
def test_turned_moments_are_mixed_by_squared_cosines(proj_type, state_bits):
    """A refresh between two steps, with the numbers of its bases, in float64."""
    shape, rank = (20, 12), 4
    p = nn.Parameter(torch.zeros(shape))
    optimizer = projected(
        [p], rank=rank, proj_type=proj_type, moments="rotate", update_proj_gap=3, beta1=0.9,
        state_bits=state_bits, min_8bit_size=1,
    )  # fmt: skip
    for t in range(3):
        p.grad = noise(shape, t)
        optimizer.step()
    state = optimizer.state[p]
    old, r, c = bases_of(state, shape), *(state[n].double().numpy() for n in parts.FACTORS)
    r, c = r.copy(), c.copy()
    e = parts._first_moment(state, parts.moment_shape(state), optimizer.param_groups[0])
    e = e.double().numpy().copy()
    g = noise(shape, 3)
    p.grad = g
    before = p.detach().clone()
    optimizer.step()
    new, g = bases_of(state, shape), g.double().numpy()
    for side, moment in ((0, r), (1, c)):
        if new[side] is not None:
            cosines = new[side].T @ old[side]
            e = cosines @ e if side == 0 else e @ cosines.T
            missing = 1 - (cosines**2).sum(axis=1)
            assert missing.max() > 0.1
            moment[:] = cosines**2 @ moment + missing * moment.mean()
    x = g if new[0] is None else new[0].T @ g
    x = x if new[1] is None else x @ new[1]
    decay = 1 - 4**-0.8
    want = [decay * m + (1 - decay) * (x**2).mean(axis) for m, axis in ((r, 1), (c, 0))]
    for name, moment in zip(parts.FACTORS, want, strict=True):
        np.testing.assert_allclose(state[name].numpy(), moment, rtol=1e-4)
    v = np.outer(want[0] / want[0].mean(), want[1])
    x = x / np.sqrt(v)
    x /= max(1.0, reference.rms(x))
    e = 0.9 * e + 0.1 * 1e-2 * x
    e = e if new[0] is None else new[0] @ e
    e = e if new[1] is None else e @ new[1].T
    change = (p - before).detach().double().numpy()
    # The turned moment is rounded to 8 bits.
    near = 1e-4 if state_bits == 32 else 0.03
    assert np.linalg.norm(change + e) < near * np.linalg.norm(e)


def turned(row, col, turn):
    state = {"exp_avg_sq_row": row.clone(), "exp_avg_sq_col": col.clone()}
    parts.turn_moments(state, turn, {"state_bits": 32})
    return state["exp_avg_sq_row"], state["exp_avg_sq_col"]


def test_the_same_subspace_keeps_its_energy_and_new_directions_take_the_mean():
    row, col = torch.rand(5) + 0.1, torch.rand(4) + 0.1
    rotation = torch.linalg.qr(noise((4, 4), 0))[0]
    unchanged, new = turned(row, col, Turn(None, rotation))
    assert torch.equal(unchanged, row)
    assert float(new.sum()) == pytest.approx(float(col.sum()), rel=1e-5)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(turned(row, col, Turn(None, torch.eye(4)[order]))[1], col[order])
    unseen = turned(row, col, Turn(None, torch.zeros(4, 4)))[1]
    torch.testing.assert_close(unseen, col.mean().expand(4))


def test_moments_of_tensors_turn_along_every_mode():
    generator = np.random.default_rng(0)
    row, col = (generator.random(s) + 0.1 for s in ((3, 4), (3, 5)))
    matrices = [np.linalg.qr(generator.standard_normal((n, n)))[0] for n in (3, 4, 5)]
    turn = ModeTurns(tuple(torch.tensor(m).float() for m in matrices))
    tensors = (torch.tensor(m).float() for m in (row, col))
    new_row, new_col = turned(*tensors, turn)
    a, b, c = (m**2 for m in matrices)
    np.testing.assert_allclose(new_row, np.einsum("ij,ik,jl->kl", row, a, b), rtol=1e-5)
    np.testing.assert_allclose(new_col, np.einsum("ij,ik,jl->kl", col, a, c), rtol=1e-5)


def loss_in_a_turning_subspace(moments, seed):
    """A quadratic bowl whose steep directions turn with every refresh."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    axis = torch.randn(8, 8, generator=generator)
    target = 3 * torch.randn(8, 12, generator=generator)
    p = nn.Parameter(torch.zeros(8, 12))
    optimizer = projected([p], lr=0.05, rank=4, beta1=0.9, update_proj_gap=10, moments=moments)
    for t in range(200):
        directions = torch.matrix_exp((axis - axis.T) / 4 * (t // 10)) @ start
        curvature = directions @ torch.diag(torch.exp(-torch.arange(8.0))) @ directions.T
        distance = p.detach() - target
        p.grad = curvature @ distance
        optimizer.step()
    return float((distance * p.grad).sum()) / 2


@pytest.mark.parametrize("seed", range(3))
def test_a_turning_subspace_is_followed_better_by_turned_moments(seed):
    kept = loss_in_a_turning_subspace("keep", seed)
    assert loss_in_a_turning_subspace("rotate", seed) < 0.9 * kept


# Properties of section 2.5


@types
@pytest.mark.parametrize(("steps", "gap"), [(10, 3), (9, 3), (5, 1), (4, 200)])
def test_refreshes_come_exactly_at_multiples_of_the_interval(proj_type, steps, gap):
    p = nn.Parameter(noise((6, 8), 0))
    optimizer = projected([p], rank=2, update_proj_gap=gap, proj_type=proj_type)
    counts = []
    for t in range(steps):
        p.grad = noise((6, 8), t)
        optimizer.step()
        counts += optimizer.refresh_counts().values()
    assert counts == [1 + t // gap for t in range(steps)]


@types
@pytest.mark.parametrize("shape", [(20, 16), (16, 20)])
def test_the_rank_of_the_change_counts_the_subspaces(proj_type, shape):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = projected([p], update_proj_gap=4, proj_type=proj_type)
    ranks = []
    for t in range(8):
        p.grad = noise(shape, t)
        optimizer.step()
        ranks.append(int(torch.linalg.matrix_rank(p.detach().double(), rtol=1e-5)))
    assert ranks == [3] * 4 + [6] * 4


@types
def test_scaling_the_loss_changes_nothing(proj_type):
    """By a power of two, so that not even rounding differs; epsilon is far below."""
    results = []
    for factor in (1.0, 1024.0):
        p = nn.Parameter(torch.ones(9, 12))
        optimizer = projected([p], update_proj_gap=3, proj_type=proj_type, beta1=0.9)
        for t in range(8):
            p.grad = factor * noise((9, 12), t)
            optimizer.step()
        results.append(p.detach())
    assert float((results[0] - 1).norm()) > 0.01
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("moments", ["keep", "rotate"])
@types
def test_signs_of_the_directions_do_not_matter(proj_type, moments, monkeypatch):
    refresh = kernels.refresh_basis

    def run(flip):
        def flipped(grads, bases, *args, **kwargs):
            outcomes = refresh(grads, bases, *args, **kwargs)
            for basis in bases:
                basis *= flip
            return outcomes

        monkeypatch.setattr(kernels, "refresh_basis", flipped)
        p = nn.Parameter(torch.ones(9, 12))
        options = {"proj_type": proj_type, "moments": moments, "update_proj_gap": 4}
        optimizer = projected([p], beta1=0.9, **options)
        for t in range(7):
            p.grad = noise((9, 12), t)
            optimizer.step()
        return p.detach()

    one, other = run(torch.ones(3)), run(torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_one_direction_is_enough_where_there_is_only_one():
    target = torch.outer(noise(16, 0), noise(8, 1))
    p = nn.Parameter(torch.zeros(16, 8))
    optimizer = projected([p], lr=0.3, rank=1, beta1=0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    for _ in range(400):
        p.grad = 2 * (p.detach() - target)
        optimizer.step()
        scheduler.step()
    assert float(target.square().sum()) > 10
    assert float((p.detach() - target).square().sum()) < 1e-3


@pytest.mark.parametrize(("beta1", "bits"), [(None, 32), (0.9, 32), (0.9, 8), (0.9, 4)])
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_resuming_in_the_middle_of_an_interval_changes_no_bit(beta1, bits, moments):
    def setup():
        params = [nn.Parameter(noise((30, 20), 0)), nn.Parameter(noise((7,), 1))]
        groups = [{"params": params[:1], "rank": 4}, {"params": params[1:], "rank": None}]
        own = {"beta1": beta1, "state_bits": bits, "moments": moments, "min_8bit_size": 1}
        return params, GaLoreAdafactor(groups, update_proj_gap=3, **own)

    def train(params, optimizer, steps):
        for t in steps:
            for p in params:
                p.grad = noise(p.shape, t)
            optimizer.step()

    params, optimizer = setup()
    train(params, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save([[p.detach().clone() for p in params], optimizer.state_dict()], buffer)
    train(params, optimizer, range(5, 10))
    others, restored = setup()
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    restored.load_state_dict(state)
    assert "betas" not in restored.param_groups[0]
    train(others, restored, range(5, 10))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(restored.state[q][name]))


@given(shape=sizes.filter(lambda s: math.prod(s) > 1), d=st.sampled_from([0.3, 1.0]))
def test_updates_are_no_larger_than_the_threshold(shape, d):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = GaLoreAdafactor([p], **{**FIXED, "lr": 1.0}, clip_threshold=d)
    for t in range(4):
        before = p.detach().clone()
        p.grad = 10.0**t * noise(shape, t)
        optimizer.step()
        assert reference.rms((p - before).detach().numpy()) <= d * (1 + 1e-4)


# Rates and schedulers


def test_schedulers_multiply_the_relative_step():
    w = np.full((4, 3), 2.0)
    p = nn.Parameter(torch.tensor(w).float())
    optimizer = GaLoreAdafactor([p], weight_decay=0.5)
    assert optimizer.param_groups[0]["lr"] == 1.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    want = reference.Adafactor(w, weight_decay=0.5)
    for t in range(4):
        assert optimizer.param_groups[0]["lr"] == 0.5**t
        p.grad = noise((4, 3), t)
        want.lr = 0.5**t
        optimizer.step()
        want.step(p.grad.numpy())
        scheduler.step()
    assert_moved_alike(p, want.w, w)


def test_schedulers_find_no_betas_to_cycle():
    optimizer = GaLoreAdafactor([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5)
    assert not {"betas", "reference"} & (set(optimizer.defaults) | set(optimizer.param_groups[0]))


def test_the_rates_are_told():
    p, q = nn.Parameter(torch.full((3, 3), 2.0)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [("w", p)]}, {"params": [("b", q)], "lr": 0.5, "relative_step": False}]
    optimizer = GaLoreAdafactor(groups, eps=(1e-30, 1e-2))
    assert optimizer.learning_rates() == pytest.approx({"w": 2e-2, "b": 5e-3})
    optimizer = GaLoreAdafactor([p], warmup_init=True)
    for t in range(3):
        p.grad = torch.ones(3, 3)
        size = float(p.detach().square().mean().sqrt())
        assert optimizer.learning_rates() == pytest.approx({"0": 1e-6 * (t + 1) * size})
        before = p.detach().clone()
        optimizer.step()
        # Gradients alike give updates of one.
        torch.testing.assert_close(p, before - 1e-6 * (t + 1) * size, rtol=0, atol=3e-7)


def test_a_rate_of_zero_moves_nothing_and_makes_all_states():
    p, q = nn.Parameter(noise((5, 4), 0)), nn.Parameter(noise((4,), 1))
    before = [p.detach().clone(), q.detach().clone()]
    groups = [{"params": [p], "rank": 2}, {"params": [q], "rank": None}]
    optimizer = GaLoreAdafactor(groups, **{**FIXED, "lr": 0.0}, beta1=0.9, weight_decay=0.1)
    for grads in ((torch.zeros(5, 4), torch.zeros(4)), (noise((5, 4), 2), noise((4,), 3))):
        p.grad, q.grad = grads
        optimizer.step()
        keys = [set(optimizer.state[x]) for x in (p, q)]
        assert torch.equal(p, before[0])
        assert torch.equal(q, before[1])
    assert {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg", "projector"} <= keys[0]
    assert {"exp_avg_sq", "exp_avg", "step", "tensor_id"} == keys[1]
    first = [GaLoreAdafactor(groups, **FIXED, beta1=0.9)._planned_state(g, x.to("meta"))
             for g, x in zip(optimizer.param_groups, (p, q), strict=True)]  # fmt: skip
    assert [set(s) | {"tensor_id"} for s in first] == keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, "lr must be None where relative_step is True, got 0.001"),
        ({"relative_step": False}, "lr must be given where relative_step is False"),
        ({**FIXED, "warmup_init": True}, "warmup_init needs relative_step"),
        ({**FIXED, "lr": -1.0}, "Invalid learning rate: -1.0"),
        ({**FIXED, "lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"eps": 1e-8}, "Invalid eps value: 1e-08"),
        ({"eps": (1e-30, -1.0)}, "Invalid eps value"),
        ({"clip_threshold": 0.0}, "Invalid clip_threshold value: 0.0"),
        ({"decay_rate": 0.8}, "Invalid decay_rate value: 0.8"),
        ({"beta1": 1.0}, "Invalid beta1 value: 1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"rank": 0}, "Invalid rank value: 0"),
        ({"proj_type": "both"}, "Invalid proj_type value: 'both'"),
        ({"moments": "turn"}, "Invalid moments value: 'turn'"),
        ({"state_bits": 3}, "Invalid state_bits value: 3"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        GaLoreAdafactor([nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize("name", ["betas", "reference"])
def test_options_of_adam_are_refused(name):
    with pytest.raises(TypeError, match=name):
        GaLoreAdafactor([nn.Parameter(torch.ones(2, 2))], **{name: (0.9, 0.99)})


def test_groups_choose_their_rates():
    p, q, r, s = (nn.Parameter(torch.ones(2, 2)) for _ in range(4))
    optimizer = GaLoreAdafactor([{"params": [p]}, {"params": [q], "lr": None}])
    optimizer.add_param_group({"params": [r], "relative_step": False, "lr": 0.1})
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 1.0, 0.1]
    for group in ({"lr": 0.5}, {"relative_step": False}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=r"lr must be|Invalid eps"):
            optimizer.add_param_group({"params": [s], **group})
    assert len(optimizer.param_groups) == 3
    fixed = GaLoreAdafactor([{"params": [p], "relative_step": True}, {"params": [q]}], **FIXED)
    assert [g["lr"] for g in fixed.param_groups] == [1.0, 0.01]
    again = GaLoreAdafactor(copy.copy(optimizer.param_groups))
    assert [g["lr"] for g in again.param_groups] == [1.0, 1.0, 0.1]
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([s])


# Numbers that are not finite, gradients that are scaled


@given(
    shape=st.tuples(st.integers(2, 6), st.integers(2, 6)) | st.tuples(st.integers(2, 6)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e25]),
    share=st.sampled_from([0.2, 0.6]),
    beta1=st.sampled_from([None, 0.9]),
)
def test_poisoned_elements_count_as_absent(shape, bad, share, beta1):
    generator = np.random.default_rng(0)
    w = generator.standard_normal(shape)
    p = nn.Parameter(torch.tensor(w).float())
    optimizer = GaLoreAdafactor([p], **FIXED, beta1=beta1)
    want = reference.Adafactor(w, **FIXED, beta1=beta1)
    poisoned = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing
        for t in range(4):
            g = generator.standard_normal(shape).astype(np.float32)
            absent = (generator.random(shape) < share) & (t > 0)
            poisoned += absent.sum()
            p.grad = torch.tensor(np.where(absent, bad, g).astype(np.float32))
            before, kept = want.w.copy(), want.e
            optimizer.step()
            want.step(np.where(absent, np.nan, g))
            want.w = np.where(absent, before, want.w)
            want.e = np.where(absent, kept, want.e)
    assert_moved_alike(p, want.w, w)
    assert optimizer.nonfinite_gradients == poisoned
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in optimizer.state[p].values())


@types
def test_zero_and_poisoned_gradients_keep_bases_and_moments(proj_type):
    p = nn.Parameter(noise((16, 8), 0))
    options = {"update_proj_gap": 2, "proj_type": proj_type, "moments": "rotate", "beta1": 0.9}
    optimizer = projected([p], **options)
    p.grad = torch.zeros(16, 8)
    optimizer.step()
    assert optimizer.refresh_counts() == {"0": 0}
    for t in range(3):
        p.grad = noise((16, 8), t)
        optimizer.step()
    state = optimizer.state[p]
    before, weights = copy.deepcopy(state), p.detach().clone()
    for _ in range(2):
        p.grad = torch.full((16, 8), float("nan"))
        optimizer.step()
    assert torch.equal(p, weights)
    assert float(state.pop("step")) == float(before.pop("step")) + 2
    for name, value in before.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name])), name


def test_gradients_without_a_single_finite_element_from_the_start():
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = GaLoreAdafactor([p], eps=(0.0, 1e-3))
    for grad in (torch.full((4, 3), math.nan), torch.zeros(4, 3)):
        p.grad = grad
        optimizer.step()
        assert torch.equal(p, torch.ones(4, 3))
    p.grad = noise((4, 3), 0)
    optimizer.step()
    assert torch.isfinite(p).all()
    assert (p != 1).all()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_scaler_on_the_device_is_honoured(monkeypatch, bits, scaled):
    """Its numbers stay tensors: no step reads them."""
    monkeypatch.setattr(_base, "stays_on_device", lambda found_inf: found_inf is not None)

    def run(factor, skip_at):
        params = [nn.Parameter(noise((12, 9), 0)), nn.Parameter(noise((6, 5), 1)),
                  nn.Parameter(noise((7,), 2)), nn.Parameter(torch.ones(()))]  # fmt: skip
        groups = [{"params": params[:1], "rank": 3}, {"params": params[1:], "rank": None}]
        optimizer = GaLoreAdafactor(
            groups, beta1=0.9, weight_decay=0.1, state_bits=bits, min_8bit_size=1,
            scale_parameter=scaled, update_proj_gap=2,
        )  # fmt: skip
        for t in range(6):
            optimizer.grad_scale = torch.full((1,), factor)
            optimizer.found_inf = torch.full((1,), float(t == skip_at))
            for i, p in enumerate(params):
                p.grad = factor * noise(p.shape, 10 * (t - (t > skip_at)) + i)
                if t == skip_at:
                    p.grad.view(-1)[0] = math.inf
            before = [p.detach().clone() for p in params]
            states = copy.deepcopy(list(optimizer.state.values()))
            optimizer.step()
            if t == skip_at:
                optimizer.state_dict()  # counts right
                for p, old in zip(params, before, strict=True):
                    assert torch.equal(p, old)
                for new, old in zip(optimizer.state.values(), states, strict=True):
                    for name in new:
                        assert torch.equal(*(torch.as_tensor(s[name]) for s in (new, old))), name
        assert optimizer.nonfinite_gradients == 0
        return [p.detach() for p in params]

    plain, scaled_up = run(1.0, 99), run(1024.0, 3)
    for a in plain:
        assert not torch.equal(a, torch.zeros_like(a))
    # One step fewer was taken: compare with a run of as many.
    again = run(1.0, 3)
    for a, b in zip(again, scaled_up, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
