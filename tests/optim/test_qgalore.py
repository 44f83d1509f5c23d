"""Q-GaLore's subspaces, refresh schedules, rounding and bytes."""

import numpy as np
import pytest
import torch
from torch import nn

import gradpress
from gradpress.ops import lowrank as kernels
from gradpress.ops import quant
from gradpress.optim import _projector

GROUP = {
    "rank": 1,
    "proj_type": "std",
    "update_proj_gap": 200,
    "queue_size": 5,
    "cos_threshold": 0.4,
    "gamma_proj": 2.0,
}


def schedule(steps, gap, cosine):
    group = {**GROUP, "update_proj_gap": gap, "projector_bits": None}
    state = {}
    _projector.new_projector(state, (4, 4), torch.device("cpu"), group, 0)
    refreshed = []
    for t in range(steps):
        if _projector.is_due(state, t):
            refreshed.append(t)
            _projector.record(state, kernels.Refresh(0, cosine, 1.0), group)
    return refreshed


@pytest.mark.parametrize(
    ("steps", "gap", "count", "last"),
    [
        (10_000, 200, 10, [1000, 1200, 1600, 3200, 6400]),
        (20_000, 200, 11, [6400, 12800]),
        (60_000, 200, 13, [12800, 25600, 51200]),
        (150_000, 500, 13, [16000, 32000, 64000, 128000]),
    ],
)
def test_published_schedules(steps, gap, count, last):
    refreshed = schedule(steps, gap, 1.0)
    assert len(refreshed) == count
    assert refreshed[-len(last) :] == last


def test_a_wandering_subspace_never_doubles():
    assert schedule(10_000, 200, 0.035) == list(range(0, 10_000, 200))


def test_staggering_spreads_refreshes():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    groups = gradpress.optim.param_groups(model, rank=2, update_proj_gap=8, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(groups, cos_threshold=2.0)
    at = {name: [] for name in dict(model.named_parameters())}
    before = dict.fromkeys(at, 0)
    for t in range(25):
        for p in model.parameters():
            p.grad = torch.randn(8, 8)
        optimizer.step()
        now = optimizer.refresh_counts()
        for name in at:
            at[name] += [t] * (now[name] - before[name])
        before = now
    assert [times[:3] for times in at.values()] == [[0, 8, 16], [0, 6, 14], [0, 4, 12], [0, 2, 10]]


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_full_rank_is_adamw_in_the_rotated_basis(shape):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = gradpress.optim.QGaLoreAdamW(
        [p], 1e-2, rank=99, update_proj_gap=1000, scale=1.0, projector_bits=None, state_bits=32
    )
    grads = [torch.randn(shape) for _ in range(20)]
    w = p.detach().double().numpy().copy()
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        optimizer.step()
        basis = optimizer.state[p]["projector"].double().numpy()
        g = g.double().numpy()
        right = shape[0] >= shape[1]
        r = g @ basis if right else basis.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w * (1 - 1e-2 * 1e-2) - 1e-2 * (u @ basis.T if right else basis @ u)
    assert np.allclose(basis.T @ basis, np.eye(min(shape)), atol=1e-5)
    # Twenty steps of about 1e-2, each with float32 rounding.
    np.testing.assert_allclose(p.detach().numpy(), w, atol=2e-5)


def test_zero_and_poisoned_gradients_keep_the_basis():
    p = nn.Parameter(torch.randn(16, 8))
    optimizer = gradpress.optim.QGaLoreAdamW([p], rank=4, update_proj_gap=2, projector_bits=None)
    p.grad = torch.zeros(16, 8)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["projector"], torch.eye(8, 4))
    p.grad = torch.randn(16, 8)
    optimizer.step()
    assert optimizer.state[p]["projector_refreshes"] == 1
    basis = optimizer.state[p]["projector"].clone()
    p.grad = torch.full((16, 8), float("inf"))
    optimizer.step()
    assert torch.equal(optimizer.state[p]["projector"], basis)
    assert optimizer.nonfinite_gradients == 64


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("part", [0.5, 0.25, 0.1, 0.02])
def test_drift_of_integer_weights(part, stochastic):
    """Small steps add up under stochastic rounding; rounded to nearest they are lost."""
    x = torch.randint(0, 200, (64, 256), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0], x[:, 1] = 0.0, 255.0
    q = quant.quantize_blockwise(x, rounding="nearest")
    steps = int(8 / part)
    update = torch.full((64, 256), part)
    update[:, :2] = 0.0  # the grid stays as it is
    for t in range(steps):
        kernels.project_back_requantize(
            [q.codes], [q.scale], [q.zero_point], [(64, 256)], [update], [],
            bits=8, group_size=256, scale=1.0, stochastic=stochastic, tensor_ids=[0], steps=[t],
        )  # fmt: skip
    after = quant.dequantize_blockwise(q.codes, q.scale, q.zero_point, shape=(64, 256))
    achieved = float((after - x)[:, 2:].double().mean()) / 8
    if stochastic:
        assert abs(achieved - 1) <= 0.05
    elif part < 0.5:
        assert achieved == 0


def test_unchanged_groups_keep_their_bits():
    x = torch.randn(8, 256)
    q = quant.quantize_blockwise(x)
    before = [t.clone() for t in (q.codes, q.scale, q.zero_point)]
    update = torch.zeros(8, 256)
    update[3, 7] = 1.0
    kernels.project_back_requantize(
        [q.codes], [q.scale], [q.zero_point], [(8, 256)], [update], [],
        bits=8, group_size=256, scale=1.0, tensor_ids=[0], steps=[1],
    )  # fmt: skip
    keep = torch.arange(8) != 3
    assert torch.equal(before[0][keep], q.codes[keep])
    assert torch.equal(before[1][keep], q.scale[keep])
    assert not torch.equal(before[0][3], q.codes[3])


def test_bytes_follow_the_formula():
    m, n, r = 1376, 512, 128
    model = gradpress.nn.quantize_(nn.Sequential(nn.Linear(n, m, bias=False)))
    groups = gradpress.optim.param_groups(model, rank=r, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(groups)
    model[0].weight.grad = torch.randn(m, n)
    optimizer.step()
    model[0].weight.grad = None
    formula = m * n * (1 + 3 / 256) + n * r * (0.5 + 3 / 256) + 2 * m * r * (1 + 4 / 256) + 4 * n
    assert gradpress.memory.count(model, optimizer).total == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize(("bits", "expected"), [(8, 2 + 8 / 256), (4, 1 + 8 / 128)])
def test_bytes_of_the_moments(bits, expected):
    p = nn.Parameter(torch.randn(512, 512))
    p.grad = torch.randn(512, 512)
    optimizer = gradpress.optim.AdamW8bit([p], state_bits=bits)
    optimizer.step()
    held = [t for name, t in optimizer.state[p].items() if name.startswith("exp_avg")]
    assert sum(t.nbytes for t in held) == expected * p.numel()
