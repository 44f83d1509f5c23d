"""Adding a dense update to a weight, whatever runs it is divided into."""

import pytest
import torch
from torch import nn

from gradpress.ops import lowrank as kernels
from gradpress.optim._weights import RUN, WIDTH, add_update, in_turns

SHAPES = [
    (1, 1),
    (3, 5),
    (48, 1),
    (48, 32),
    (1, RUN),
    (3, RUN // 2),
    (7, RUN // 3 + 1),
    (2 * RUN, 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def reference(p, update, group, state, decay):
    """In one piece, an element in a row."""
    p, one = p.detach().clone(), torch.ones(1, 1)
    kernels.project_back_add(
        [p.view(-1, 1)],
        [update.view(-1, 1)],
        [one],
        scale=1.0,
        decay=decay,
        stochastic_rounding=group["stochastic_rounding"],
        seed=group["seed"],
        tensor_ids=[state["tensor_id"]],
        steps=[int(state["step"])],
    )
    return p


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("poisoned", [True, False])
def test_bits_do_not_depend_on_the_division(shape, dtype, stochastic, poisoned):
    torch.manual_seed(0)
    p, update = nn.Parameter(torch.randn(shape).to(dtype)), 0.01 * torch.randn(shape)
    group = {"stochastic_rounding": stochastic, "seed": 7}
    state = {"tensor_id": 3, "step": torch.tensor(5.0)}
    if poisoned:
        update.view(-1)[:: max(1, update.numel() // 3)] = float("nan")
        update.view(-1)[-1] = float("inf")
    before = p.detach().clone()
    want = reference(p, update, group, state, 0.25)
    add_update(p, update, group, state, decay=0.25, found_inf=None)
    assert torch.equal(p, want)
    finite = update.isfinite()
    assert torch.equal(p[~finite], before[~finite])
    plain = (0.75 * before.float() + update)[finite]
    spacing = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(p.detach()[finite].float(), plain, rtol=spacing, atol=spacing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scalers_flag_is_heeded(dtype):
    p = nn.Parameter(torch.randn(WIDTH, 3).to(dtype))
    before = p.detach().clone()
    group = {"stochastic_rounding": True, "seed": 0}
    state = {"tensor_id": 0, "step": torch.tensor(1.0)}
    add_update(p, torch.ones(WIDTH, 3), group, state, decay=0.5, found_inf=torch.ones(1))
    assert torch.equal(p, before)
    add_update(p, torch.ones(WIDTH, 3), group, state, decay=0.5, found_inf=torch.zeros(1))
    assert not torch.equal(p, before)


def test_weights_that_are_not_contiguous():
    p = nn.Parameter(torch.randn(6, 8).T)
    before = p.detach().clone()
    group = {"stochastic_rounding": True, "seed": 0}
    state = {"tensor_id": 0, "step": torch.tensor(1.0)}
    with torch.no_grad():
        add_update(p, torch.ones(8, 6), group, state, decay=0.5, found_inf=None)
    torch.testing.assert_close(p.detach(), 0.5 * before + 1)
    assert not p.is_contiguous()


def test_turns_are_runs_of_one_step_and_of_bounded_size():
    params = [torch.empty(1).expand(n << 20) for n in (1, 2, 1, 1, 9, 1, 1, 1)]
    steps = [1, 1, 1, 1, 1, 1, 2, 2]
    runs = list(in_turns(params, steps))
    assert runs == [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6), slice(6, 8)]
    assert list(in_turns([], [])) == []
