"""GaLore: subspaces of every type, refreshes, moments that turn, the released code's form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradpress
from gradpress.ops import lowrank as kernels
from gradpress.optim import _projector
from gradpress.optim._moments import Turn, turn_moments
from gradpress.optim._products import transposed_product

TYPES = ["std", "reverse_std", "left", "right", "full"]
SHAPES = [(12, 7), (7, 12), (9, 9)]
types = pytest.mark.parametrize("proj_type", TYPES)
shapes = pytest.mark.parametrize("shape", SHAPES)


def galore(params, **options):
    return gradpress.optim.GaLoreAdamW(params, **{"weight_decay": 0.0, **options})


def plain_sgd(**options):
    """Options with which Adam's denominator is a constant: a step of 1e-2 along the gradient."""
    return {"lr": 1e4, "eps": 1e6, "betas": (0.0, 0.0), "scale": 1.0, **options}


def spectrum(shape, generator, decay=0.5):
    """A matrix whose singular values fall so fast that a randomized search finds them exactly."""
    short = min(shape)
    left, right = (np.linalg.qr(generator.standard_normal((n, short)))[0] for n in shape)
    return (left * decay ** np.arange(short)) @ right.T


@types
@shapes
@pytest.mark.parametrize("rank", [None, 99])
def test_full_rank_with_a_linear_rule_is_sgd(proj_type, shape, rank):
    torch.manual_seed(0)
    start = torch.randn(shape)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    # A basis of the longer side spans all of a gradient, but not all of the next one.
    keeps_long = _projector.LONG in _projector.kept_bases(shape, proj_type)
    gap = 1 if keeps_long and shape[0] != shape[1] else 3
    rank = rank or min(shape)
    ours = galore([p], **plain_sgd(rank=rank, proj_type=proj_type, update_proj_gap=gap))
    sgd = torch.optim.SGD([q], lr=1e-2)
    for _ in range(7):
        # Depends on the parameters, so that an error would go on growing.
        p.grad, q.grad = (torch.sin(3 * w.detach()) for w in (p, q))
        ours.step()
        sgd.step()
    moved = float((q - start).detach().norm())
    assert float((p - q).detach().norm()) < 1e-5 * moved
    assert ours.refresh_counts() == {"0": math.ceil(7 / gap)}


@types
@shapes
@pytest.mark.parametrize("rank", [1, 3])
def test_after_a_refresh_the_step_is_the_best_approximation(proj_type, shape, rank):
    """Of a gradient that has nothing to do with the one before it, too."""
    generator = np.random.default_rng(1)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = galore([p], **plain_sgd(rank=rank, proj_type=proj_type, update_proj_gap=3))
    for t in range(4):
        grad = spectrum(shape, generator, 0.2)
        before = p.detach().clone().double()
        p.grad = torch.tensor(grad).float()
        optimizer.step()
        change = (before - p.detach().double()).numpy() / 1e-2
        u, s, vh = np.linalg.svd(grad)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        residual = np.linalg.norm(grad - change) ** 2 / np.sum(s[rank:] ** 2)
        if t == 0:
            assert np.linalg.norm(change - best) < 1e-5 * np.linalg.norm(best)
        elif t == 3:
            # One warm iteration, towards directions that it could not expect.
            assert 1 - 1e-4 < residual < 4
        else:
            assert residual > 10


@types
@pytest.mark.parametrize(("steps", "gap"), [(10, 3), (9, 3), (1, 3), (5, 1), (4, 200)])
def test_refreshes_come_exactly_at_multiples_of_the_interval(proj_type, steps, gap):
    p = nn.Parameter(torch.randn(6, 8))
    optimizer = galore([p], rank=2, update_proj_gap=gap, proj_type=proj_type)
    at, count = [], 0
    for t in range(steps):
        p.grad = torch.randn(6, 8)
        optimizer.step()
        (now,) = optimizer.refresh_counts().values()
        at += [t] * (now - count)
        count = now
    assert at == list(range(0, steps, gap))
    assert count == math.ceil(steps / gap)


@types
@pytest.mark.parametrize("shape", [(20, 16), (16, 20)])
def test_the_rank_of_the_change_counts_the_subspaces(proj_type, shape):
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(shape))
    rank, gap = 3, 5
    optimizer = galore([p], lr=1e-2, rank=rank, update_proj_gap=gap, proj_type=proj_type)
    ranks = []
    for _ in range(3 * gap):
        p.grad = torch.randn(shape)
        optimizer.step()
        ranks.append(int(torch.linalg.matrix_rank(p.detach().double(), rtol=1e-5)))
    assert ranks[:gap] == [rank] * gap
    assert ranks[gap:] == [2 * rank] * gap + [3 * rank] * gap


def test_one_direction_learns_as_fast_as_adam_where_there_is_only_one():
    u = torch.randn(16, generator=torch.Generator().manual_seed(0))
    target = torch.outer(u, torch.randn(8, generator=torch.Generator().manual_seed(1)))
    losses = []
    for make in (
        lambda p: galore([p], lr=0.05, rank=1, scale=1.0),
        lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.0),
    ):
        p = nn.Parameter(torch.zeros(16, 8))
        optimizer = make(p)
        for _ in range(400):
            p.grad = 2 * (p.detach() - target)
            optimizer.step()
        losses.append(float((p.detach() - target).square().sum()))
    assert float(target.square().sum()) > 10
    assert max(losses) < 1e-3


@types
def test_scaling_the_loss_changes_nothing(proj_type):
    """A power of two, so that not even rounding differs, and no epsilon to notice it."""
    results = []
    for factor in (1.0, 1024.0):
        p = nn.Parameter(torch.ones(9, 12))
        optimizer = galore([p], rank=3, eps=0.0, update_proj_gap=3, proj_type=proj_type)
        for t in range(8):
            p.grad = factor * torch.randn(9, 12, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        results.append(p.detach())
    assert not torch.equal(results[0], torch.ones(9, 12))
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
        options = {"rank": 3, "proj_type": proj_type, "moments": moments, "update_proj_gap": 4}
        optimizer = galore([p], lr=1e-2, **options)
        for t in range(7):
            p.grad = torch.randn(9, 12, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        return p.detach()

    one, other = run(torch.ones(3)), run(torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def jump_at_refresh(moments, state_bits=32):
    """How much the first step after a refresh differs from the one before it.

    The gradient's two directions exchange their ranks: the same subspace in other coordinates.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 2, generator=generator))[0]
    rows = torch.linalg.qr(torch.randn(20, 2, generator=generator))[0].T
    p = nn.Parameter(torch.zeros(12, 20))
    optimizer = galore(
        [p], lr=1e-2, rank=2, scale=1.0, update_proj_gap=40, moments=moments,
        state_bits=state_bits, min_8bit_size=1,
    )  # fmt: skip
    steps = []
    for t in range(44):
        strengths = torch.tensor([4.0, 1.0] if t < 40 else [1.0, 4.0])
        p.grad = (basis * strengths) @ rows
        before = p.detach().clone()
        optimizer.step()
        steps.append(p.detach() - before)
    return float((steps[40] - steps[39]).norm() / steps[39].norm())


@pytest.mark.parametrize("state_bits", [32, 8])
def test_turned_moments_do_not_jump(state_bits):
    """Where the directions change places, kept moments go to the wrong ones."""
    keep, rotate = (jump_at_refresh(moments, state_bits) for moments in ("keep", "rotate"))
    assert rotate < 0.5 * keep


def loss_in_a_turning_subspace(moments, seed, state_bits):
    """A quadratic bowl whose steep directions turn with every refresh."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    axis = torch.randn(8, 8, generator=generator)
    target = 3 * torch.randn(8, 12, generator=generator)
    p = nn.Parameter(torch.zeros(8, 12))
    optimizer = galore(
        [p], lr=0.02, betas=(0.9, 0.99), rank=4, scale=1.0, update_proj_gap=10, moments=moments,
        state_bits=state_bits, min_8bit_size=1,
    )  # fmt: skip
    for t in range(200):
        directions = torch.matrix_exp((axis - axis.T) / 4 * (t // 10)) @ start
        curvature = directions @ torch.diag(torch.exp(-torch.arange(8.0))) @ directions.T
        distance = p.detach() - target
        p.grad = curvature @ distance
        optimizer.step()
    return float((distance * p.grad).sum()) / 2


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_a_turning_subspace_is_followed_better_by_turned_moments(moments, seed, state_bits):
    kept = loss_in_a_turning_subspace("keep", seed, state_bits)
    assert loss_in_a_turning_subspace(moments, seed, state_bits) < 0.7 * kept


@pytest.mark.parametrize("proj_type", ["std", "right"])
def test_turned_moments_are_those_of_the_new_coordinates(proj_type):
    """Of a constant gradient: the first moment is linear, and the variance is zero."""
    p = nn.Parameter(torch.zeros(9, 6))
    options = {"rank": 6, "update_proj_gap": 5, "proj_type": proj_type, "moments": "rotate"}
    optimizer = galore([p], betas=(0.9, 0.99), eps=0.0, **options)
    grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        p.grad = grad
        optimizer.step()
    state = optimizer.state[p]
    other = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    p.grad = other
    optimizer.step()
    r, now = (g @ state["projector"] for g in (grad, other))
    mean, square = (1 - 0.9**5) * r, (1 - 0.99**5) * r.square()
    torch.testing.assert_close(state["exp_avg"], 0.9 * mean + 0.1 * now)
    torch.testing.assert_close(state["exp_avg_sq"], 0.99 * square + 0.01 * now.square())


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_turned_moments_follow_the_rule_of_ldadam(sides, steps):
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((n, n)) / 3 if on else None
                   for n, on in zip((4, 6), sides, strict=True))  # fmt: skip
    m, v = generator.standard_normal((4, 6)), generator.random((4, 6)) + 1
    state = {"exp_avg": torch.tensor(m).float(), "exp_avg_sq": torch.tensor(v).float()}
    turn = Turn(*(None if c is None else torch.tensor(c).float() for c in (left, right)))
    turn_moments(state, (4, 6), turn, steps, {"betas": (0.9, 0.99)})
    if steps:
        bias = 1 - 0.9**steps, 1 - 0.99**steps
        a, b = (np.eye(n) if c is None else c for n, c in ((4, left), (6, right)))
        mean, square = m / bias[0], v / bias[1]
        m = a @ m @ b.T
        v = bias[1] * np.abs((a * a) @ (square - mean**2) @ (b * b).T + (a @ mean @ b.T) ** 2)
    np.testing.assert_allclose(state["exp_avg"].numpy(), m, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state["exp_avg_sq"].numpy(), v, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "p", "q"), [(1, 1, 1), (5, 7, 3), (300, 4, 6), (1000, 300, 257), (600, 2, 513)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_all_shapes(rows, p, q, dtype):
    a, b = torch.randn(rows, p), torch.randn(rows, q).to(dtype)
    want = a.double().T @ b.double()
    got = transposed_product(a, b)
    assert got.shape == (p, q)
    assert float((got - want).abs().max()) < 1e-5 * rows**0.5 * 4


@types
def test_same_bits_for_all_threads_where_products_are_long(proj_type, restore_threads):
    results = []
    for threads in (1, 4):
        torch.set_num_threads(1)
        p = nn.Parameter(torch.zeros(300, 500))
        options = {"rank": 16, "proj_type": proj_type, "moments": "rotate", "update_proj_gap": 2}
        optimizer = galore([p], **options)
        for t in range(4):
            p.grad = torch.randn(300, 500, generator=torch.Generator().manual_seed(t))
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        results.append(p.detach())
    assert torch.equal(*results)
    assert float(results[0].norm()) > 0


@pytest.mark.parametrize("reference", [False, True])
def test_a_reset_begins_anew_bias_correction_included(reference):
    """The step of a refresh is a first step; that of the released code has a larger epsilon."""
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = galore(
        [p], lr=1e-2, eps=1e-2, rank=4, scale=1.0, moments="reset", update_proj_gap=5,
        reference=reference,
    )  # fmt: skip
    for _ in range(11):
        before = p.detach().clone()
        p.grad = torch.randn(8, 6)
        optimizer.step()
    basis = optimizer.state[p]["projector"]
    r = p.grad @ basis
    eps = 1e-2 / math.sqrt(1 - 0.999) if reference else 1e-2
    want = -1e-2 * (r / (r.abs() + eps)) @ basis.T
    torch.testing.assert_close(p.detach() - before, want, rtol=0, atol=1e-6)
    assert optimizer.refresh_counts() == {"0": 3}


@pytest.mark.parametrize("stagger", [False, True])
def test_refreshes_come_together_unless_staggered(stagger):
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(2)]
    optimizer = galore(params, rank=2, update_proj_gap=4, stagger=stagger)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(8, 6)
        optimizer.step()
    assert list(optimizer.refresh_counts().values()) == ([1, 2] if stagger else [1, 1])


def released_adamw(w, grads, lr, betas, eps, decay, rank, scale, left):
    """The loop of galore_torch's AdamW in float64; the projector is that of the first step."""
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        if t == 1:
            u, _, vh = np.linalg.svd(g)
            basis = u[:, :rank] if left else vh[:rank].T
        r = basis.T @ g if left else g @ basis
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r**2
        size = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        direction = m / (np.sqrt(v) + eps)
        w = w - size * scale * (basis @ direction if left else direction @ basis.T)
        w = w - lr * decay * w
    return w


@shapes
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_reference_is_the_released_form(shape, proj_type):
    """A large epsilon and a large decay, which show where they stand."""
    generator = np.random.default_rng(0)
    grads = [spectrum(shape, generator, 0.2).astype(np.float32) for _ in range(6)]
    numbers = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 0.05}
    w = generator.standard_normal(shape)
    want = released_adamw(
        w, grads, **numbers, decay=0.5, rank=2, scale=0.25, left=proj_type == "left"
    )
    results = []
    for reference in (True, False):
        p = nn.Parameter(torch.tensor(w).float())
        options = {**numbers, "rank": 2, "scale": 0.25, "proj_type": proj_type}
        optimizer = galore([p], weight_decay=0.5, reference=reference, **options)
        for g in grads:
            p.grad = torch.tensor(g)
            optimizer.step()
        results.append(float(np.abs(p.detach().numpy() - want).max()))
    assert results[0] < 2e-6
    assert results[1] > 1e-3


def test_reference_counts_for_what_is_not_projected():
    w, grads = np.ones(3), [np.array([0.1, -0.02, 0.003])] * 4
    numbers = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 0.05}
    m = v = 0.0
    want = w
    for t, g in enumerate(grads, 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        want = want - 0.03 * math.sqrt(1 - 0.9**t) / (1 - 0.8**t) * m / (np.sqrt(v) + 0.05)
        want = want * (1 - 0.03 * 0.5)
    p = nn.Parameter(torch.tensor(w).float())
    optimizer = galore([p], weight_decay=0.5, reference=True, **numbers)
    for g in grads:
        p.grad = torch.tensor(g).float()
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), want, atol=1e-6)


@types
@pytest.mark.parametrize(("state_bits", "near"), [(8, 0.05), (4, 0.5)])
@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_moments_of_few_bits_stay_near(proj_type, state_bits, near, moments):
    results = []
    for bits in (32, state_bits):
        p = nn.Parameter(torch.zeros(40, 64))
        options = {"rank": 8, "update_proj_gap": 6, "proj_type": proj_type, "moments": moments}
        optimizer = galore([p], lr=1e-2, state_bits=bits, min_8bit_size=1, **options)
        generator = torch.Generator().manual_seed(0)
        drift = torch.randn(40, 64, generator=generator)
        for _ in range(16):
            p.grad = drift + torch.randn(40, 64, generator=generator)
            optimizer.step()
        results.append(p.detach())
        assert ("exp_avg_codes" in optimizer.state[p]) == (bits != 32)
    assert float((results[0] - results[1]).norm()) < near * float(results[0].norm())


@types
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_train(proj_type, bits):
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(32, 24, bias=False)), bits=bits)
    teacher = torch.randn(24, 32) / 6
    options = {"rank": 8, "update_proj_gap": 20, "scale": 1.0, "proj_type": proj_type}
    optimizer = galore(model.parameters(), lr=5e-3, **options)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 32)
        loss = (model(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # Steps of rank x rank entries go less far; 4 bits have a floor.
    most = 0.7 if proj_type == "full" else 0.45
    assert np.mean(losses[-10:]) < most * np.mean(losses[:3])


@types
def test_tensors_of_higher_order_are_matrices(proj_type):
    grads = [torch.randn(6, 2, 2, 3) for _ in range(4)]
    results = []
    for shape in ((6, 2, 2, 3), (6, 12)):
        p = nn.Parameter(torch.ones(shape))
        optimizer = galore([p], rank=2, proj_type=proj_type, update_proj_gap=2)
        for grad in grads:
            p.grad = grad.view(shape).clone()
            optimizer.step()
        results.append(p.detach().view(6, 12))
    assert torch.equal(*results)


@types
def test_zero_and_poisoned_gradients_keep_the_bases(proj_type):
    p = nn.Parameter(torch.randn(16, 8))
    options = {"rank": 4, "update_proj_gap": 2, "proj_type": proj_type, "moments": "rotate"}
    optimizer = galore([p], **options)

    def bases():
        state = optimizer.state[p]
        names = (_projector.SHORT, _projector.LONG)
        return [state[name].clone() for name in names if name in state]

    p.grad = torch.zeros(16, 8)
    optimizer.step()
    assert all(torch.equal(b, torch.eye(*b.shape)) for b in bases())
    p.grad = torch.randn(16, 8)
    optimizer.step()
    assert optimizer.refresh_counts() == {"0": 1}
    before, weights = bases(), p.detach().clone()
    for _ in range(2):
        p.grad = torch.full((16, 8), float("nan"))
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, bases(), strict=True))
    assert torch.equal(p, weights)
    assert optimizer.refresh_counts() == {"0": 1}


def test_options_may_differ_by_group():
    a, b = nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8, 6))
    groups = [
        {"params": [a], "rank": 2, "proj_type": "full", "projector_bits": 4},
        {"params": [b], "rank": 3, "proj_type": "reverse_std", "state_bits": 8},
    ]
    optimizer = galore(groups, min_8bit_size=1)
    for p in (a, b):
        p.grad = torch.randn(8, 6)
    optimizer.step()
    first, second = optimizer.state[a], optimizer.state[b]
    assert first["exp_avg"].shape == (2, 2)
    assert {"projector_codes", "projector_long_codes"} <= first.keys()
    assert second["exp_avg_codes"].shape == (3, 6)
    assert second["projector_long"].shape == (8, 3)
    assert "projector" not in second
    assert [row.rank for row in optimizer.report().rows] == [2, 3]


@pytest.mark.parametrize(
    ("proj_type", "elements"),
    [("std", 6 * 3 + 2 * 8 * 3), ("reverse_std", 8 * 3 + 2 * 6 * 3), ("full", 14 * 3 + 2 * 9)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_bytes_are_those_of_the_paper(proj_type, elements, transposed):
    p = nn.Parameter(torch.ones((6, 8) if transposed else (8, 6)))
    optimizer = galore([p], rank=3, proj_type=proj_type)
    p.grad = torch.randn(p.shape)
    optimizer.step()
    kept = {n: t for n, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
    # Beside them the counter, and the leading direction on the shorter side.
    assert sum(t.nbytes for t in kept.values()) == 4 * (elements + 1 + 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_type": "both"}, "Invalid proj_type value: 'both'"),
        ({"moments": "turn"}, "Invalid moments value: 'turn'"),
        ({"projector_bits": 2}, "Invalid projector_bits value: 2"),
        ({"update_proj_gap": 0}, "Invalid update_proj_gap value: 0"),
        ({"rank": 0}, "Invalid rank value: 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        galore([nn.Parameter(torch.ones(2, 2))], **options)
