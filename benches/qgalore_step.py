"""A whole optimizer step of Q-GaLore on a LLaMA: ordinary steps, refresh steps, bytes held."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gradpress
from benches import shim
from benches.harness import Case, Options, Samples, no_collection, one_round, peer
from benches.report import Report
from benches.tables import Table, number, percent
from benches.workloads import Gradients, llama, nbytes, state_bytes
from gradpress.train.sizes import SIZES

LR = 1e-3
SCALE = 0.25
GROUP = 256
#: Steps from one refresh to the next, short so that both kinds are measured.
GAP = 4

_INT8 = "gradpress QGaLoreAdamW, INT8 weights"
_FIRST, _REFRESH, _ORDINARY = "first step", "refresh step", "ordinary step"


@dataclass
class Contender:
    """An optimizer on a model of its own.

    Attributes:
        name: Unique in the comparison.
        optimizer: Steps `weights`.
        weights: The parameters, in the model's order.
        assign: Hands a parameter its gradient.
    """

    name: str
    optimizer: torch.optim.Optimizer
    weights: list[torch.Tensor]
    assign: Callable[[torch.Tensor, torch.Tensor], None]

    def case(self, gradients: Sequence[torch.Tensor]) -> Case:
        """One step; the gradients are set anew each time, since one peer replaces them."""

        def before() -> None:
            for weight, grad in zip(self.weights, gradients, strict=True):
                self.assign(weight, grad)

        return Case(self.name, self.optimizer.step, before)

    def weight_bytes(self) -> int:
        """Bytes of the weights, with scales and zero points where they are integers."""
        grids = [[getattr(w, n, None) for n in ("scales", "zeros")] for w in self.weights]
        return nbytes([self.weights, grids])


def run(options: Options) -> Report:
    """Steps all contenders in turn."""
    size = "tiny" if options.quick else "60M"
    rank = SIZES[size].rank
    rounds = options.rounds(5)
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        contenders = _contenders(size, rank, notes, stack)
        shapes = [tuple(p.shape) for p in llama(size).parameters()]
        gradients = Gradients(shapes, rank // 2)
        cases = [contender.case(gradients.values) for contender in contenders]
        samples = _steps(cases, gradients, rounds)
        tables = [
            *(_time_table(kind, samples[kind], contenders) for kind in (_ORDINARY, _REFRESH)),
            _first_table(samples[_FIRST], contenders),
            _byte_table(contenders),
        ]
    bound = _bound(_projected_shapes(size), shapes, rank, options)
    share = bound / samples[_ORDINARY].median(_INT8)
    notes.append(
        f"Bound of an ordinary step: {number(1e3 * bound)} ms, of which `{_INT8}` reaches"
        f" {percent(share)}. It is the time of the products that project gradients and updates at"
        " the rate of `torch.mm`, plus that of moving each byte of the other parameters, their"
        " gradients and 8-bit moments once at the rate of a copy."
    )
    title = f"A Q-GaLore step on a LLaMA of {size}, rank {rank}"
    return Report(title, [*_ABOUT, *notes], rounds, tables)


_ABOUT = (
    "Every row is `optimizer.step()` over all parameters of one model, on the same gradients: low"
    f" rank plus noise that is new in every step. The subspaces are refreshed in every {GAP}th"
    " step, of all layers together (no staggering, no lengthening of the interval), and ordinary"
    " and refresh steps are timed apart. There is no forward pass.",
    "Linear weights but the head are projected; embedding, head and norms take the optimizer's own"
    " full-rank rule: 8-bit moments in gradpress and q-galore-torch, float32 moments in"
    " galore-torch. The work differs: galore-torch keeps float32 projectors and moments;"
    " q-galore-torch keeps 4-bit projectors in a byte each, and makes float copies of its INT8"
    " weights; both find subspaces by a full `linalg.svd`, gradpress by a randomized, warm-started"
    " iteration. `torch AdamW(fused=True)` on all parameters, full rank, is the anchor.",
    "q-galore-torch runs through `benches/shim.py`: as published it does not run with this"
    " bitsandbytes, nor on a CPU. `x` is how many times as long the row takes as"
    f" `{_INT8}`.",
)


def _model(size: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return llama(size)


def _float_grad(weight: torch.Tensor, grad: torch.Tensor) -> None:
    if hasattr(weight, "float_grad"):
        weight.float_grad = grad
    else:
        weight.grad = grad


def _plain_grad(weight: torch.Tensor, grad: torch.Tensor) -> None:
    weight.grad = grad


def _contenders(
    size: str, rank: int, notes: list[str], stack: contextlib.ExitStack
) -> list[Contender]:
    found = [_ours(_INT8, gradpress.nn.quantize_(_model(size)), rank)]
    found.append(_ours("gradpress QGaLoreAdamW, float32 weights", _model(size), rank))
    if (galore := peer("galore_torch")) is None:
        notes.append("Left out: galore-torch, which is not installed.")
    else:
        found.append(_galore(galore.GaLoreAdamW, _model(size), rank))
    try:
        q_galore = stack.enter_context(shim.q_galore_on_cpu())
    except ImportError as error:
        notes.append(f"Left out: q-galore-torch: {error}.")
    else:
        for integers in (True, False):
            found.append(_q_galore(q_galore.QGaLoreAdamW8bit, _model(size), rank, integers))
    model = _model(size)
    fused = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    found.append(Contender("torch AdamW(fused=True)", fused, list(model.parameters()), _plain_grad))
    return found


def _ours(name: str, model: torch.nn.Module, rank: int) -> Contender:
    # No cosine reaches 2: the interval stays. All refreshes fall on the same step, as the peers'.
    groups = gradpress.optim.param_groups(
        model, rank, GAP, SCALE, verbose=False, stagger=False, cos_threshold=2.0
    )
    optimizer = gradpress.optim.QGaLoreAdamW(groups, lr=LR)
    return Contender(name, optimizer, list(model.parameters()), _plain_grad)


def _split(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """The names of the projected parameters, and of the others."""
    groups = gradpress.optim.param_groups(model, 1, verbose=False)
    projected, rest = ([name for name, _ in group["params"]] for group in groups)
    return projected, rest


def _projected_shapes(size: str) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        model = llama(size)
    named = dict(model.named_parameters())
    return [tuple(named[name].shape) for name in _split(model)[0]]


def _galore(make: Callable[..., Any], model: torch.nn.Module, rank: int) -> Contender:
    named = dict(model.named_parameters())
    projected, rest = ([named[name] for name in names] for names in _split(model))
    keys = {"rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
    groups = [{"params": projected, **keys}, {"params": rest}]
    optimizer = make(groups, lr=LR, weight_decay=0.01, no_deprecation_warning=True)
    name = "galore_torch GaLoreAdamW, float32 weights"
    return Contender(name, optimizer, list(named.values()), _plain_grad)


def _q_galore(
    make: Callable[..., Any], model: torch.nn.Module, rank: int, integers: bool
) -> Contender:
    named: dict[str, Any] = dict(model.named_parameters())
    projected, rest = _split(model)
    if integers:
        for name in projected:
            named[name] = shim.integer_parameter(named[name].detach(), GROUP)
            named[name].float_grad = None
    keys = {"rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
    quantized = {"quant": True, "quant_group_size": GROUP, "quant_n_bit": 4}
    interval = {"cos_threshold": 2.0, "gamma_proj": 2, "queue_size": 5}
    groups = [
        {"params": [named[name] for name in projected], **keys, **quantized, **interval},
        {"params": [named[name] for name in rest]},
    ]
    optimizer = make(groups, lr=LR, weight_decay=0.01)
    kind = "INT8" if integers else "float32"
    name = f"q_galore_torch QGaLoreAdamW8bit, {kind} weights"
    return Contender(name, optimizer, list(named.values()), _float_grad)


def _steps(cases: Sequence[Case], gradients: Gradients, repeats: int) -> dict[str, Samples]:
    """Steps all contenders in turn: one interval for warming up, then `repeats` intervals."""
    samples = {kind: Samples() for kind in (_FIRST, _REFRESH, _ORDINARY)}
    with no_collection():
        for step in range(GAP * (1 + repeats)):
            gradients.fill()
            kind = _FIRST if step == 0 else _ORDINARY if step % GAP else _REFRESH
            times = one_round(cases, step)
            if step == 0 or step >= GAP:
                samples[kind].add(times)
    return samples


def _bound(
    projected: Sequence[tuple[int, ...]],
    shapes: Sequence[tuple[int, ...]],
    rank: int,
    options: Options,
) -> float:
    """Seconds that an ordinary step takes at the machine's limits."""
    weights = sum(m * n for m, n in projected)
    operations = 2 * 2 * weights * rank
    others = sum(torch.Size(shape).numel() for shape in shapes) - weights
    # Parameter read and written, gradient read, two moments of a byte read and written.
    moved = others * (4 + 4 + 4 + 2 + 2)
    return operations / options.limits.flops + moved / options.limits.copy


def _time_table(kind: str, samples: Samples, contenders: Sequence[Contender]) -> Table:
    head = ("optimizer", "ms, median", "ms, min", "x")
    rows = []
    for name in (contender.name for contender in contenders):
        median, least = samples.median(name), samples.minimum(name)
        ratio = number(samples.ratio(name, _INT8))
        rows.append((name, number(1e3 * median), number(1e3 * least), ratio))
    return Table(kind.capitalize(), head, rows)


def _first_table(samples: Samples, contenders: Sequence[Contender]) -> Table:
    rows = [(c.name, number(1e3 * samples.median(c.name))) for c in contenders]
    note = "One sample each: states are allocated, and every subspace is found from nothing."
    return Table(_FIRST.capitalize(), ("optimizer", "ms"), rows, [note])


def _byte_table(contenders: Sequence[Contender]) -> Table:
    rows = []
    for contender in contenders:
        weights, states = contender.weight_bytes(), state_bytes(contender.optimizer)
        cells = (number(weights / 1e6, 4), number(states / 1e6, 4))
        rows.append((contender.name, *cells, number((weights + states) / 1e6, 4)))
    note = "States are moments, projectors and their scales. Gradients are the same for all."
    return Table("Bytes held", ("optimizer", "weights, MB", "states, MB", "sum, MB"), rows, [note])
