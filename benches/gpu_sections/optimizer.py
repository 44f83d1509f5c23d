"""One step of AdamW over all parameters of a model, beside torch's and bitsandbytes'."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.gpu_sections.models import parameter_shapes
from benches.gpu_sections.profiling import Launches, profile
from benches.gpu_sections.timing import in_a_row, interleave
from benches.harness import Case, Samples, peer
from benches.tables import Table, number
from benches.workloads import state_bytes
from gradpress.optim import AdamW8bit

SIZE, SMALLER, QUICK = "350M", "130M", "tiny"
#: Of all contenders together with two sets of gradients, in float32.
BYTES_PER_PARAMETER = 44
ROUNDS = 21
LR, WEIGHT_DECAY = 1e-4, 1e-2
#: Steps whose result is compared with the CPU.
CHECKED_STEPS = 3

OURS, SMALL_OURS = "gradpress AdamW8bit", "gradpress AdamW8bit(state_bits=4)"
FUSED, BITSANDBYTES = "torch AdamW(fused=True)", "bitsandbytes AdamW8bit"
TARGETS = {FUSED: 1.0, BITSANDBYTES: 2.0}

Params = list[torch.nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]


def run(context: Context, findings: Findings) -> None:
    """Times both precisions."""
    size = _size(context, findings)
    shapes = parameter_shapes(size)
    for dtype in (torch.float32, torch.bfloat16):
        try:
            _measure(context, findings, size, shapes, dtype)
        except Exception as error:  # the other precision is still of interest
            findings.check(f"{dtype}: {type(error).__name__}: {error}", right=False)
        context.release()


def _size(context: Context, findings: Findings) -> str:
    if context.quick:
        return QUICK
    need = BYTES_PER_PARAMETER * sum(torch.Size(s).numel() for s in parameter_shapes(SIZE))
    if context.free_bytes() >= need:
        return SIZE
    findings.note(f"The parameters of {SMALLER}: those of {SIZE} need {need / 2**30:.0f} GiB.")
    return SMALLER


def _makers(findings: Findings) -> dict[str, Make]:
    shared: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    makers: dict[str, Make] = {
        OURS: partial(AdamW8bit, **shared),
        SMALL_OURS: partial(AdamW8bit, state_bits=4, **shared),
        FUSED: partial(torch.optim.AdamW, fused=True, **shared),
    }
    if (bitsandbytes := peer("bitsandbytes")) is None:
        findings.note("Left out: bitsandbytes, which is not installed.")
    else:
        makers[BITSANDBYTES] = partial(bitsandbytes.optim.AdamW8bit, **shared)
    return makers


def _measure(
    context: Context,
    findings: Findings,
    size: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    name = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    kind: Any = {"device": context.device, "dtype": dtype}
    values = [torch.empty(s, **kind).normal_(std=0.02) for s in shapes]
    gradients = [[torch.empty(s, **kind).normal_(std=1e-3) for s in shapes] for _ in range(2)]
    cases, params, optimizers = [], {}, {}
    for who, make in _makers(findings).items():
        params[who] = [torch.nn.Parameter(value.clone()) for value in values]
        before = _next_gradients(params[who], gradients)
        try:
            optimizer = make(params[who])
            before()
            optimizer.step()
            context.synchronize()
        except Exception as error:
            if who in (OURS, SMALL_OURS):
                raise
            findings.note(f"Left out: {who}, {name}: {type(error).__name__}: {error}")
            continue
        optimizers[who] = optimizer
        cases.append(Case(who, optimizer.step, before))
    findings.check(
        f"AdamW8bit, {name}: {CHECKED_STEPS} steps on some parameters are the CPU's",
        _like_the_cpu(values, gradients, params[OURS], cases[0]),
    )
    del values
    samples = interleave(context, cases, 3 if context.quick else ROUNDS)
    rows = {who: statistics.median(_queued(context, case)) for who, case in _by_name(cases)}
    launches = profile(context, findings, _step(cases[0]), f"AdamW8bit, {name}")
    finite = all(bool(p.isfinite().all()) for p in params[OURS])
    findings.check(f"AdamW8bit, {name}: all parameters are finite", finite)
    _summary(findings, f"AdamW8bit step, {size}, {name}", samples, launches)
    count = sum(p.numel() for p in params[OURS])
    findings.table(
        _table(
            f"A step of AdamW, all parameters of a LLaMA of {size}, {name}",
            samples,
            rows,
            optimizers,
            count,
        )
    )
    if launches is not None:
        findings.table(launches.table(f"Kernels of a step of `{OURS}`, LLaMA of {size}, {name}"))


def _next_gradients(
    params: Params, gradients: Sequence[Sequence[torch.Tensor]]
) -> Callable[[], None]:
    sets = itertools.cycle(gradients)

    def assign() -> None:
        for p, grad in zip(params, next(sets), strict=True):
            p.grad = grad

    return assign


def _step(case: Case) -> Callable[[], None]:
    def call() -> None:
        assert case.before is not None
        case.before()
        case.run()

    return call


def _by_name(cases: Sequence[Case]) -> list[tuple[str, Case]]:
    return [(case.name, case) for case in cases]


def _queued(context: Context, case: Case) -> list[float]:
    """Steps one after another, for which the host does not wait."""
    return in_a_row(context, _step(case), 3 if context.quick else ROUNDS)


def _like_the_cpu(
    values: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
    params: Params,
    case: Case,
) -> bool:
    """Whether a matrix, a norm and the last tensor are bit for bit what the CPU makes of them.

    The first step is done already. Parameters that are left out keep their places, by which random
    numbers are drawn, as tensors without elements.
    """
    chosen = {1, next(i for i, v in enumerate(values) if v.dim() == 1), len(values) - 1}
    on_cpu = [
        torch.nn.Parameter(
            value.to("cpu", copy=True) if i in chosen else torch.zeros(0, dtype=value.dtype)
        )
        for i, value in enumerate(values)
    ]
    optimizer = AdamW8bit(on_cpu, lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(CHECKED_STEPS):
        for i in chosen:
            on_cpu[i].grad = gradients[step % len(gradients)][i].cpu()
        optimizer.step()
        if step > 0:
            _step(case)()
    moved = all(not torch.equal(params[i], values[i]) for i in chosen)
    return moved and all(torch.equal(params[i].cpu(), on_cpu[i]) for i in chosen)


def _summary(
    findings: Findings, quantity: str, samples: Samples, launches: Launches | None
) -> None:
    for who, target in TARGETS.items():
        if who in samples.seconds:
            findings.times(quantity, samples.median(OURS), samples.median(who), who, target)
    if launches is None:
        return
    own, other = launches.count(ours=True), launches.count(ours=False)
    # One for tensors with moments of a byte, one for those too small for it.
    findings.row(
        f"launches of an {quantity}",
        f"{own} of ours, {other} others",
        target="2 of ours, no other",
        met=(own, other) == (2, 0),
    )


def _table(
    title: str,
    samples: Samples,
    queued: dict[str, float],
    optimizers: dict[str, torch.optim.Optimizer],
    count: int,
) -> Table:
    head = ("optimizer", "ms, median", "ms, min", "ms, queued", "x", "state B/param")
    rows = [
        (
            who,
            number(1e3 * samples.median(who)),
            number(1e3 * samples.minimum(who)),
            number(1e3 * queued[who]),
            number(samples.ratio(who, OURS)),
            number(state_bytes(optimizer) / count),
        )
        for who, optimizer in optimizers.items()
    ]
    notes = (
        "`ms` is a step alone on an idle card, from the call to the end of its last kernel, the"
        " host's work included; `ms, queued` a step among others that the host issues ahead, as in"
        f" training. `x` is how many times as long the row takes as `{OURS}`, alone.",
    )
    return Table(title, head, rows, notes)
