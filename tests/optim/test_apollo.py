"""APOLLO: random sketches, learning rates of channels, and the limit to growth."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradpress
from gradpress.optim._gaussian import gaussian
from gradpress.optim._limiter import limit_growth, total_norm

SHAPES = [(12, 7), (7, 12), (9, 9), (40, 3), (1, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES)
CPU = torch.device("cpu")


def apollo(params, **options):
    return gradpress.optim.Apollo(params, **{"weight_decay": 0.0, **options})


def mini(params, **options):
    return gradpress.optim.ApolloMini(params, **{"weight_decay": 0.0, **options})


def draw(shape, seed=0, tensor_id=0, number=0):
    return gaussian(shape, seed=seed, tensor_id=tensor_id, draw=number, device=CPU)


def test_random_matrices_are_normal():
    x = draw((1000, 1001)).double().numpy().ravel()
    n = x.size
    moments = [np.mean(x**k) for k in (1, 2, 3, 4)]
    # Five standard deviations of each moment of normal numbers.
    for moment, mean, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - mean) < 5 * math.sqrt(variance / n)
    assert abs(np.mean(np.abs(x) > 3) - math.erfc(3 / math.sqrt(2))) < 5 * math.sqrt(0.0027 / n)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(n)
    half = (n + 1) // 2
    assert abs(np.corrcoef(x[: n - half], x[half:])[0, 1]) < 5 / math.sqrt(n - half)


def test_random_matrices_depend_on_the_key_alone():
    base = draw((30, 20))
    assert torch.equal(base, draw((30, 20)))
    keys = [{"seed": 1}, {"tensor_id": 1}, {"number": 1}, {"seed": 2**63}, {"seed": 2**64 - 1}]
    others = [draw((30, 20), **key) for key in keys]
    for i, one in enumerate([base, *others]):
        for other in others[i:]:
            assert abs(float((one * other).mean())) < 5 / math.sqrt(600)


def test_random_matrices_are_these_numbers():
    """On every machine and every device: SplitMix64 in Python's integers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    key = mix((mix((5 + golden * 4) % 2**64) + golden * 3) % 2**64)
    want = []
    for trigonometric in (math.cos, math.sin):
        for counter in range(1, 5):
            bits = mix((counter * golden + key) % 2**64)
            radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
            want.append(radius * trigonometric(2 * math.pi * (bits % 2**32) / 2**32))
    got = draw((1, 7), seed=5, tensor_id=3, number=2)
    assert torch.equal(got, torch.tensor(want[:7], dtype=torch.float64).bfloat16().float()[None])


def transcription(w, grads, ids, *, lr, betas, eps, decay, rank, gap, scale, front, kind, gamma):
    """Section 3 of the paper in float64, the projection drawn by the library."""
    small, wide = min(w.shape), w.shape[0] < w.shape[1]
    rank = min(rank, small)
    m = v = 0.0
    previous = None
    for t, grad in enumerate(grads, 1):
        projection = draw((small, rank), ids["seed"], ids["tensor_id"], (t - 1) // gap)
        projection = projection.double().numpy() / math.sqrt(rank)
        g = grad if wide else grad.T
        r = projection.T @ g
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r**2
        adam = m / (np.sqrt(v) + eps)
        axis = 0 if kind == "channel" else None
        s = np.linalg.norm(adam, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        u = g * s
        if front:
            u = u * math.sqrt(scale)
        if gamma is not None:
            norm = np.linalg.norm(u)
            limit = 1.0 if previous is None else max(norm / (previous + 1e-8), gamma) / gamma
            u, previous = u / limit, norm / limit
        if not front:
            u = u * math.sqrt(scale)
        w = w - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * (u if wide else u.T)
        w = w * (1 - lr * decay)
    return w


@shapes
@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize(("front", "gamma"), [(False, 1.01), (True, 1.01), (False, None)])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_the_papers(shape, kind, front, gamma, maximize):
    generator = np.random.default_rng(0)
    growth = np.linspace(0.5, 3, 9)  # so that the limiter has something to do
    grads = [f * generator.standard_normal(shape).astype(np.float32) for f in growth]
    w = generator.standard_normal(shape)
    numbers = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 0.01}
    want = transcription(
        w, grads, {"seed": 3, "tensor_id": 1}, **numbers, decay=0.5, rank=2, gap=4, scale=9.0,
        front=front, kind=kind, gamma=gamma,
    )  # fmt: skip
    first, p = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor(w).float())
    optimizer = apollo(
        [first, p], **numbers, weight_decay=0.5, rank=2, update_proj_gap=4, scale=9.0, seed=3,
        scale_front=front, scale_type=kind, norm_growth=gamma, maximize=maximize,
    )  # fmt: skip
    for g in grads:
        p.grad = torch.tensor(-g if maximize else g).float()
        optimizer.step()
    moved = np.linalg.norm(want - w)
    assert np.linalg.norm(p.detach().numpy() - want) < 1e-5 * moved
    assert optimizer.refresh_counts() == {"1": 3}
    (row,) = optimizer.report().rows
    assert (row.rank, row.steps, row.interval) == (min(2, *shape), 9, 4)


def test_state_has_no_projection():
    p = nn.Parameter(torch.ones(64, 48))
    for make, elements in ((lambda p: apollo(p, rank=8), 2 * 64 * 8), (mini, 2 * 64)):
        optimizer = make([p])
        p.grad = torch.randn(64, 48)
        optimizer.step()
        tensors = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        # Beside the moments a counter and the limiter's norm.
        assert sum(t.nbytes for t in tensors) == 4 * (elements + 2)


@pytest.mark.parametrize("divisor", [4, 8])
def test_factors_are_those_of_full_rank_times_a_root(divisor):
    """Section 4 of the paper: sketches of rank r give sqrt(r / n) of the full factor."""
    torch.manual_seed(0)
    n, m = 192, 512
    grads = [torch.randn(n, m) for _ in range(6)]
    rank = n // divisor
    moved = []
    for options in ({"rank": rank}, {"rank": n}):
        p = nn.Parameter(torch.zeros(n, m))
        optimizer = apollo([p], lr=1.0, eps=0.0, norm_growth=None, **options)
        for grad in grads[:-1]:
            p.grad = grad
            optimizer.step()
        before = p.detach().clone()
        p.grad = grads[-1]
        optimizer.step()
        # A column is its gradient times its factor.
        moved.append(((p.detach() - before) / grads[-1]).mean(0))
    ratio = (moved[0] / moved[1]).mean()
    assert float(ratio) == pytest.approx(divisor**-0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_updates_are_gradients_times_factors(kind):
    p = nn.Parameter(torch.zeros(6, 10))
    optimizer = apollo([p], rank=3, scale_type=kind)
    p.grad = torch.randn(6, 10)
    optimizer.step()
    factors = -p.detach() / p.grad
    assert (factors > 0).all()
    same = factors if kind == "tensor" else factors.max(0, keepdim=True).values.expand(6, 10)
    reference = same.max() if kind == "tensor" else same
    torch.testing.assert_close(factors, reference.expand(6, 10), rtol=1e-4, atol=0)
    if kind == "channel":
        assert float(factors[0].max() / factors[0].min()) > 1.01


def test_mini_is_apollo_with_other_defaults():
    grads = [torch.randn(8, 6) for _ in range(3)]
    results = []
    for make in (
        lambda p: mini([p], lr=1e-3),
        lambda p: apollo([p], lr=1e-3, rank=1, scale=128.0, scale_type="tensor"),
    ):
        p = nn.Parameter(torch.ones(8, 6))
        optimizer = make(p)
        for grad in grads:
            p.grad = grad
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(8, 6))


def test_groups_leave_what_they_are_not_told_to_the_optimizer():
    model = nn.Sequential(nn.Linear(8, 6), nn.Embedding(4, 8))
    groups = gradpress.optim.param_groups(model, rank=1, verbose=False)
    optimizer = mini(groups)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert [group["scale"] for group in optimizer.param_groups] == [128.0, 128.0]
    assert list(optimizer.refresh_counts()) == ["0.weight"]


def test_norms_grow_by_the_limit_at_most():
    """Gradients that grow tenfold: the update follows by one percent a step, and falls at once."""
    p = nn.Parameter(torch.zeros(8, 16))
    optimizer = apollo([p], lr=1.0, betas=(0.0, 0.0), rank=4)
    # Without memory Adam's direction is a sign: the size of the gradient must come from elsewhere.
    grad = torch.randn(8, 16)
    norms = []
    for t in range(12):
        optimizer.param_groups[0]["scale_front"] = True
        optimizer.param_groups[0]["scale"] = 100.0 if 3 <= t < 8 else 1.0
        before = p.detach().clone()
        p.grad = grad
        optimizer.step()
        norms.append(float((p.detach() - before).norm()))
    ratios = [b / a for a, b in itertools.pairwise(norms)]
    assert ratios[:2] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert ratios[2:7] == pytest.approx([1.01] * 5, abs=1e-4)
    assert ratios[7] == pytest.approx(1.01**-5, abs=1e-4)
    assert ratios[8:] == pytest.approx([1.0] * 3, abs=1e-4)


def test_the_limiter_step_by_step():
    previous = torch.zeros(())

    def limited(norm, found_inf=None):
        norm = torch.tensor(norm)
        return float(norm * limit_growth(norm, previous, 1.01, found_inf))

    assert limited(2.0) == 2.0  # the first one is taken as it is
    assert limited(5.0) == pytest.approx(2.02)
    assert limited(1.0) == pytest.approx(1.0)
    assert limited(0.0) == 0.0
    assert limited(3.0) == pytest.approx(1.01)  # a zero is no reason to begin anew from nothing
    before = previous.clone()
    limited(9.0, torch.ones(1))
    limited(float("inf"))
    assert torch.equal(previous, before)
    limited(9.0, torch.zeros(1))
    assert float(previous) == pytest.approx(1.01 * float(before))


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (1024, 2), (1, 100_000), (1030, 1030)])
def test_norms_have_the_same_bits_for_all_threads(shape, restore_threads):
    x = torch.randn(shape)
    norms = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        norms.append(total_norm(x))
    assert norms[0] == norms[1] == norms[2]
    assert float(norms[0]) == pytest.approx(float(x.double().norm()), rel=1e-6)


def test_a_zero_gradient_does_not_stop_the_steps_after_it():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = apollo([p], rank=2)
    sizes = []
    for t in range(4):
        before = p.detach().clone()
        p.grad = torch.zeros(8, 6) if t == 2 else torch.ones(8, 6)
        optimizer.step()
        sizes.append(float((p.detach() - before).norm()))
    assert sizes[2] == 0
    assert sizes[3] > 0.5 * sizes[1] > 0


@pytest.mark.parametrize("make", [apollo, mini])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_same_bits_for_all_threads_where_sums_are_long(make, shape, restore_threads):
    results = []
    for threads in (1, 4):
        torch.set_num_threads(1)
        p = nn.Parameter(torch.zeros(shape))
        optimizer = make([p], rank=16, update_proj_gap=2)
        for t in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)
        results.append(p.detach())
    assert torch.equal(*results)
    assert float(results[0].norm()) > 0


def test_poisoned_elements_are_left_alone():
    start = torch.randn(6, 10)
    p = nn.Parameter(start.clone())
    optimizer = apollo([p], rank=3)
    p.grad = torch.ones(6, 10)
    p.grad[2, 4] = float("nan")
    optimizer.step()
    assert torch.equal(p[:, 4], start[:, 4])  # its column has no sketch
    keep = torch.arange(10) != 4
    assert (p[:, keep] < start[:, keep]).all()
    assert optimizer.nonfinite_gradients > 0


@pytest.mark.parametrize("make", [apollo, mini])
@pytest.mark.parametrize(("state_bits", "near"), [(8, 0.03), (4, 0.3)])
def test_moments_of_few_bits_stay_near(make, state_bits, near):
    results = []
    for bits in (32, state_bits):
        p = nn.Parameter(torch.zeros(40, 512))
        optimizer = make([p], lr=1e-2, rank=4, state_bits=bits, min_8bit_size=1)
        generator = torch.Generator().manual_seed(0)
        drift = torch.randn(40, 512, generator=generator)
        for _ in range(16):
            p.grad = drift + torch.randn(40, 512, generator=generator)
            optimizer.step()
        results.append(p.detach())
        assert ("exp_avg_codes" in optimizer.state[p]) == (bits != 32)
    distance = float((results[0] - results[1]).norm())
    assert 0 < distance < near * float(results[0].norm())


@pytest.mark.parametrize("make", [apollo, mini])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_train(make, bits):
    torch.manual_seed(0)
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(32, 24, bias=False)), bits=bits)
    teacher = torch.randn(24, 32) / 6
    options = {"rank": 8, "lr": 1e-2} if make is apollo else {"lr": 3e-3}
    optimizer = make(model.parameters(), update_proj_gap=20, **options)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 32)
        loss = (model(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_bfloat16_weights_move_on_average():
    """Steps far below the spacing of bfloat16 add up: one rounding, and that a fair one."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = mini([p], lr=1e-5, scale=1.0)
        for _ in range(100):
            p.grad = torch.ones(64, 64, dtype=dtype)
            optimizer.step()
        results.append(float(p.detach().double().mean()) - 1)
    assert results[0] < 0
    assert abs(results[0]) < 2**-8
    assert results[1] == pytest.approx(results[0], rel=0.1)


def test_tensors_of_higher_order_are_matrices():
    grads = [torch.randn(6, 2, 2, 3) for _ in range(4)]
    results = []
    for shape in ((6, 2, 2, 3), (6, 12)):
        p = nn.Parameter(torch.ones(shape))
        optimizer = apollo([p], rank=2, update_proj_gap=2)
        for grad in grads:
            p.grad = grad.view(shape).clone()
            optimizer.step()
        results.append(p.detach().view(6, 12))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "Invalid scale value: -1.0"),
        ({"scale_type": "row"}, "Invalid scale_type value: 'row'"),
        ({"norm_growth": 0.9}, "Invalid norm_growth value: 0.9"),
        ({"update_proj_gap": 0}, "Invalid update_proj_gap value: 0"),
        ({"rank": 0}, "Invalid rank value: 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        apollo([nn.Parameter(torch.ones(2, 2))], **options)
