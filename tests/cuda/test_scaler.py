"""What a gradient scaler hands over as tensors, which the ops read where they lie."""

import pytest
import torch

from gradpress.ops import lowrank, optim, quant

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "steps": [1]}


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def step(grad, **options):
    p, m, v = randn(300), torch.zeros(300), torch.zeros(300)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    ids = {"tensor_ids": [0], "weight_decay": 0.1, "nonfinite": nonfinite}
    optim.adamw_step([p], [grad], [m], [v], **HYPER, **ids, **options)
    return p, m, v, nonfinite


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scale", [1.0, 3.0, 65536.0])
def test_scales_as_tensors_are_those_as_numbers(scale):
    grad = randn(300) * scale
    want = step(grad, grad_scale=scale)
    for tensor in (torch.tensor(scale), torch.tensor([scale])):
        assert same(step(grad, grad_scale=tensor), want)
    assert same(step(grad, grad_scale=torch.tensor(scale), found_inf=torch.tensor(0.0)), want)


def test_nothing_is_written_where_infinities_were_found():
    grad = randn(300)
    grad[7] = float("inf")
    before = randn(300), torch.zeros(300), torch.zeros(300), torch.zeros(1, dtype=torch.int64)
    assert same(step(grad, found_inf=torch.tensor([1.0])), before)
    assert step(grad)[3] == 1

    flags = {"seed": 0, "tensor_ids": [0], "steps": [1], "found_inf": torch.tensor(1.0)}
    param, update, basis = randn(6, 4), randn(6, 2), torch.eye(4, 2)
    p = param.clone()
    lowrank.project_back_add([p], [update], [basis], scale=1.0, **flags)
    assert torch.equal(p, param)
    lowrank.project_back_add([p], [update], [basis], scale=1.0, **{**flags, "found_inf": None})
    assert not torch.equal(p, param)

    parts = quant.quantize_blockwise(param, group_size=8)
    kept = [t.clone() for t in parts[:3]]
    lists = [[t] for t in parts[:3]]
    layout = {"bits": 8, "group_size": 8, "scale": 1.0}
    for u, b in (([update], [basis]), ([param], [])):
        lowrank.project_back_requantize(*lists, [(6, 4)], u, b, **layout, **flags)
        assert same(parts[:3], kept)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"grad_scale": torch.ones(2)},
            ValueError,
            r"adamw_step: grad_scale_tensor must have one element, got shape \[2\]",
        ),
        (
            {"found_inf": torch.ones(1, dtype=torch.float64)},
            TypeError,
            "adamw_step: found_inf must have dtype float32, got float64",
        ),
        ({"grad_scale": 0.0}, ValueError, "adamw_step: grad_scale must be positive and finite"),
    ],
)
def test_scales_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        step(randn(300), **options)
