"""How far the optimizers end from their originals, on the same gradients: not timings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import gradpress
from benches.harness import Options, peer
from benches.report import Report
from benches.shim import q_galore_on_cpu, without_waiting
from benches.tables import Table

LR, STEPS, GAP, RANK = 1e-2, 12, 4, 8
#: The last one is not a matrix; all have as many elements as 8-bit moments need.
SHAPES = ((96, 64), (64, 96), (96, 96), (4096,))

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

_ABOUT = (
    f"Both optimizers of a row take {STEPS} steps on the same gradients, which have a few strong"
    " directions, the same parameters, and the options that make them the same method. Shown is"
    " the distance between where they end, over the way that the other one has gone; for methods"
    f" that project, to rank {RANK} with a refresh every {GAP} steps. Distances of 1e-6 are"
    " float32's rounding; 8-bit moments differ by single codes of their maps.",
    "Where a distance is large, the last column says why.",
)


@dataclass(frozen=True)
class Pair:
    """One of ours, and what it is compared with.

    Attributes:
        ours: How it is called in the table.
        theirs: The other's name.
        make: Both, from groups; the other is None where it is not installed.
        low_rank: Options of the matrices' group for both; None does not project.
        remark: What is known of the difference.
    """

    ours: str
    theirs: str
    make: tuple[Make, Make | None]
    low_rank: tuple[dict[str, Any], dict[str, Any]] | None = None
    remark: str = ""


def run(options: Options) -> Report:
    """Compares every pair whose peer is installed."""
    with ExitStack() as stack:
        stack.enter_context(without_waiting())
        pairs = list(_pairs(stack))
        rows = [_row(pair) for pair in pairs if pair.make[1] is not None]
    notes = [f"Left out: {p.theirs}, which is not installed." for p in pairs if p.make[1] is None]
    table = Table("Distance over the way gone", ("ours", "theirs", "distance", "why"), rows)
    return Report("Agreement with the originals", [*_ABOUT, *notes], 1, [table])


def _pairs(stack: ExitStack) -> Iterator[Pair]:
    optim = gradpress.optim
    plain = {"lr": LR, "weight_decay": 0.0}
    whole: dict[str, Any] = {**plain, "state_bits": 32}
    yield Pair(
        "AdamW8bit(state_bits=32)",
        "torch AdamW",
        (partial(optim.AdamW8bit, **whole), partial(torch.optim.AdamW, **plain)),
    )
    for name in ("bitsandbytes.optim", "torchao.optim"):
        yield Pair(
            "AdamW8bit",
            f"{name.partition('.')[0]} AdamW8bit",
            (partial(optim.AdamW8bit, **plain), _theirs(name, "AdamW8bit", **plain)),
        )
    yield from _element_wise(plain, whole)
    yield from _low_rank(plain)
    q_galore = None
    if peer("q_galore_torch") is not None:
        q_galore = stack.enter_context(q_galore_on_cpu()).QGaLoreAdamW8bit
    keys = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25}
    lazy = {"cos_threshold": 2.0, "gamma_proj": 2, "queue_size": 5}
    codes = {"quant": True, "quant_group_size": 256, "quant_n_bit": 4}
    yield Pair(
        "QGaLoreAdamW",
        "q-galore-torch, through a shim",
        (
            partial(optim.QGaLoreAdamW, **plain),
            None if q_galore is None else partial(q_galore, **plain),
        ),
        ({**keys, **lazy}, {**keys, **lazy, **codes, "proj_type": "std"}),
        "INT4 projectors: the original's group of one sign saturates, ours includes zero",
    )


def _element_wise(plain: dict[str, Any], whole: dict[str, Any]) -> Iterator[Pair]:
    optim = gradpress.optim
    yield Pair(
        "AdamP(state_bits=32)",
        "adamp AdamP",
        (partial(optim.AdamP, **whole), _theirs("adamp", "AdamP", **plain)),
    )
    yield Pair(
        "SGDP(state_bits=32)",
        "adamp SGDP",
        (
            partial(optim.SGDP, momentum=0.9, **whole),
            _theirs("adamp", "SGDP", momentum=0.9, **plain),
        ),
        remark="the original projects its momentum buffer itself, through an alias",
    )
    yield Pair(
        "DiffGrad(state_bits=32)",
        "pytorch_optimizer DiffGrad",
        (
            partial(optim.DiffGrad, lr=LR, state_bits=32),
            _theirs("pytorch_optimizer", "DiffGrad", lr=LR),
        ),
    )


def _low_rank(plain: dict[str, Any]) -> Iterator[Pair]:
    optim = gradpress.optim
    keys: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25}
    named = ({**keys, "proj_type": "std"}, {**keys, "proj_type": "std"})
    eps = {"eps": 1e-6}
    yield Pair(
        "GaLoreAdamW(reference=True)",
        "galore-torch GaLoreAdamW",
        (
            partial(optim.GaLoreAdamW, reference=True, **eps, **plain),
            _theirs("galore_torch", "GaLoreAdamW", no_deprecation_warning=True, **plain),
        ),
        named,
        "LAPACK chooses signs anew at a refresh, which the original's moments do not follow",
    )
    once = {**keys, "update_proj_gap": 1000}
    yield Pair(
        "the same, one subspace",
        "galore-torch GaLoreAdamW",
        (
            partial(optim.GaLoreAdamW, reference=True, **eps, **plain),
            _theirs("galore_torch", "GaLoreAdamW", no_deprecation_warning=True, **plain),
        ),
        ({**once, "proj_type": "std"}, {**once, "proj_type": "std"}),
    )
    own = {"relative_step": False, "scale_parameter": False, "beta1": 0.9}
    yield Pair(
        "GaLoreAdafactor, one subspace",
        "galore-torch GaLoreAdafactor",
        (
            partial(optim.GaLoreAdafactor, **own, **plain),
            _theirs("galore_torch", "GaLoreAdafactor", **own, **plain),
        ),
        ({**once, "proj_type": "std"}, {**once, "proj_type": "std"}),
    )
    yield Pair(
        "Fira(reference=True), one subspace",
        "pytorch_optimizer Fira",
        (
            partial(optim.Fira, reference=True, **eps, **plain),
            _theirs("pytorch_optimizer", "Fira", **eps, **plain),
        ),
        (once, {**once, "projection_type": "std"}),
    )


def _theirs(module: str, name: str, **options: Any) -> Make | None:
    package = peer(module)
    return None if package is None else partial(getattr(package, name), **options)


def _row(pair: Pair) -> tuple[str, str, str, str]:
    assert pair.make[1] is not None
    ours, theirs = (
        _trained(make, None if pair.low_rank is None else pair.low_rank[i])
        for i, make in enumerate(pair.make)
        if make is not None
    )
    gone = sum(float((a - b).square().sum()) for a, b in zip(theirs, _start(), strict=True))
    apart = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return pair.ours, pair.theirs, f"{(apart / gone) ** 0.5:.1e}", pair.remark


def _start() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _trained(make: Make, low_rank: dict[str, Any] | None) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(value) for value in _start()]
    if low_rank is None:
        groups: list[dict[str, Any]] = [{"params": params}]
    else:
        groups = [{"params": params[:3], **low_rank}, {"params": params[3:]}]
    optimizer = make(groups)
    for step in range(STEPS):
        for index, p in enumerate(params):
            p.grad = _gradient(SHAPES[index], index, step)
        optimizer.step()
    return [p.detach() for p in params]


def _gradient(shape: tuple[int, ...], index: int, step: int) -> torch.Tensor:
    """Strong directions that stay, with weights and noise that are new in every step."""
    fixed = torch.Generator().manual_seed(100 + index)
    drawn = torch.Generator().manual_seed(1000 * index + step)
    noise = 0.01 * torch.randn(shape, generator=drawn)
    if len(shape) == 1:
        return noise + torch.randn(shape, generator=fixed)
    left, right = (torch.linalg.qr(torch.randn(n, RANK, generator=fixed))[0] for n in shape)
    sizes = torch.linspace(8.0, 1.0, RANK) * (1.0 + 0.1 * torch.rand(RANK, generator=drawn))
    return noise + (left * sizes) @ right.T
