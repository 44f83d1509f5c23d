"""A whole optimizer step of Q-GaLore over the parameters of a 1B LLaMA: time and memory."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from benches.gpu_sections import rule
from benches.gpu_sections.contenders import (
    GALORE,
    OURS,
    OURS_DENSE,
    Contender,
    Make,
    instant_subspaces,
    makers,
)
from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.gpu_sections.models import Llama
from benches.gpu_sections.profiling import profile
from benches.gpu_sections.timing import alone
from benches.tables import Table, number
from benches.workloads import Gradients
from gradpress.nn import QuantizedWeight
from gradpress.optim import QGaLoreAdamW
from gradpress.train.sizes import SIZES

SIZE, SMALLER, QUICK = "1B", "350M", "tiny"
#: Free memory that the steps of 1B need: weights, gradients, and what the largest peer adds.
NEEDED_BYTES = 16 << 30
#: Steps from one refresh to the next, and how often that is run.
GAP, INTERVALS = 8, 2
QUICK_GAP = 2
#: Of the model on which refreshes are compared, since the peers' take seconds for each matrix.
REFRESH_LAYERS = 1
#: Warm refreshes of ours there.
WARM_REFRESHES = 4
#: Seconds that have to be left for a peer's refresh.
REFRESH_SECONDS = 25
DTYPE = torch.bfloat16

FIRST, REFRESH, ORDINARY = "first step", "refresh step", "ordinary step"


@dataclass
class Outcome:
    """What the steps of a contender took.

    Attributes:
        seconds: By kind of step, one entry for each.
        peak: The most bytes held in a step, by kind of step.
        held: Bytes of weights and of states.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    held: tuple[int, int] = (0, 0)

    def median(self, kind: str) -> float:
        """The median of a kind of step."""
        return statistics.median(self.seconds[kind])


def run(context: Context, findings: Findings) -> None:
    """Steps the whole model, then refreshes a short one."""
    size = _size(context, findings)
    rank = SIZES[size].rank
    name = f"{size}, rank {rank}"
    outcomes = _whole(context, findings, size, rank)
    _summarize(findings, name, outcomes)
    findings.table(_table(f"A step of Q-GaLore, all parameters of a LLaMA of {name}", outcomes))
    context.release()
    refreshes = _refreshes(context, findings, size, rank)
    if refreshes:
        findings.table(
            _refresh_table(f"Refreshes, {REFRESH_LAYERS} block of a LLaMA of {name}", refreshes)
        )


def _size(context: Context, findings: Findings) -> str:
    if context.quick:
        return QUICK
    if context.free_bytes() >= NEEDED_BYTES:
        return SIZE
    findings.note(f"The parameters of {SMALLER}: those of {SIZE} need {NEEDED_BYTES >> 30} GiB.")
    return SMALLER


def _build(
    context: Context, name: str, make: Make, size: str, gap: int, layers: int | None = None
) -> Contender:
    torch.manual_seed(0)
    model = Llama(size, context.device, DTYPE, layers)
    return Contender(name, model, make(model, SIZES[size].rank, gap))


def _gradients(context: Context, size: str, layers: int | None = None) -> Gradients:
    shapes = [tuple(p.shape) for p in Llama(size, "meta", DTYPE, layers).parameters()]
    torch.manual_seed(1)
    return Gradients(shapes, SIZES[size].rank // 2, context.device, DTYPE)


def _whole(context: Context, findings: Findings, size: str, rank: int) -> dict[str, Outcome]:
    gap = QUICK_GAP if context.quick else GAP
    gradients = _gradients(context, size)
    outcomes: dict[str, Outcome] = {}
    for name, make in makers(findings).items():
        own = name in (OURS, OURS_DENSE)
        contender: Contender | None = None
        try:
            contender = _build(context, name, make, size, gap)
            with contextlib.nullcontext() if own else instant_subspaces():
                outcomes[name] = _steps(context, findings, contender, gradients, gap, own)
        except Exception as error:
            if own:
                raise
            findings.note(f"Left out: {name}: {type(error).__name__}: {error}")
        # The model would otherwise stay into the next contender's turn.
        contender = None
        context.release()
    return outcomes


def _steps(
    context: Context,
    findings: Findings,
    contender: Contender,
    gradients: Gradients,
    gap: int,
    own: bool,
) -> Outcome:
    """Intervals of one contender; a peer's refreshes, which find nothing, are left out."""
    outcome = Outcome()
    for step in range(INTERVALS * gap + 1):
        kind = ORDINARY if step % gap else REFRESH if step else FIRST
        gradients.fill()
        contender.assign(gradients.values)
        expected = _expectations(contender) if step == gap + 1 and contender.name == OURS else []
        context.release()
        context.reset_peak()
        seconds = alone(context, contender.optimizer.step)
        for item in expected:
            what, right = item.verdict()
            findings.check(f"an ordinary step of an INT8 weight, {what}", right)
        # What is expected takes memory, too: that step is not counted.
        if (own or kind == ORDINARY) and not expected:
            outcome.seconds.setdefault(kind, []).append(seconds)
            outcome.peak[kind] = max(outcome.peak.get(kind, 0), context.peak_bytes())
    outcome.held = contender.bytes_held()
    findings.check(f"{contender.name}: all weights are finite", contender.finite() or not own)
    if contender.name == OURS:
        assert isinstance(contender.optimizer, QGaLoreAdamW)
        rows = contender.optimizer.report().projected
        good = all(0 < row.energy <= 1.001 and row.refreshes == INTERVALS + 1 for row in rows)
        findings.check(f"{len(rows)} subspaces were refreshed {INTERVALS + 1} times", good)
        what = f"Kernels of an ordinary step, `{OURS}`"
        gradients.fill()
        contender.assign(gradients.values)
        launches = profile(context, findings, contender.optimizer.step, what)
        if launches is not None:
            findings.table(launches.table(what))
    return outcome


def _expectations(contender: Contender) -> list[rule.Expected]:
    """For a square, a tall and a wide weight of the first block."""
    found: dict[tuple[int, ...], rule.Expected] = {}
    group: dict[str, Any] = contender.optimizer.param_groups[0]
    for p in group["params"]:
        if isinstance(p, QuantizedWeight) and tuple(p.shape) not in found:
            expected = rule.expect(p, contender.optimizer.state[p], group)
            if expected is not None:
                found[tuple(p.shape)] = expected
    return list(found.values())


def _refreshes(
    context: Context, findings: Findings, size: str, rank: int
) -> dict[str, list[float]]:
    """Seconds of steps in which every subspace is found anew, the first from nothing."""
    gradients = _gradients(context, size, REFRESH_LAYERS)
    available = makers(findings)
    found: dict[str, list[float]] = {}
    torch.linalg.svd(torch.randn(64, 64, device=context.device), full_matrices=False)
    for name in (OURS, GALORE):
        if name not in available:
            continue
        if name == GALORE and context.left() < REFRESH_SECONDS:
            findings.note(f"{name}: no time was left for a refresh.")
            continue
        contender = _build(context, name, available[name], size, 1, REFRESH_LAYERS)
        try:
            for _ in range(1 + WARM_REFRESHES if name == OURS else 1):
                gradients.fill()
                contender.assign(gradients.values)
                found.setdefault(name, []).append(alone(context, contender.optimizer.step))
        except Exception as error:
            if name == OURS:
                raise
            findings.note(f"{name}, a refresh: {type(error).__name__}: {error}")
        if name == OURS:
            what = f"Kernels of a warm refresh step, {REFRESH_LAYERS} block"
            launches = profile(context, findings, contender.optimizer.step, what)
            if launches is not None:
                findings.table(launches.table(what))
        context.release()
    if GALORE in found:
        (peer,) = found[GALORE]
        ours, *warm = found[OURS]
        quantity = f"Q-GaLore refresh step, {REFRESH_LAYERS} block of {size}"
        findings.times(f"{quantity}, cold", ours, peer, "galore_torch GaLoreAdamW")
        findings.times(
            f"{quantity}, warm", statistics.median(warm), peer, "galore_torch GaLoreAdamW"
        )
    return found


def _summarize(findings: Findings, name: str, outcomes: dict[str, Outcome]) -> None:
    ours = outcomes[OURS]
    peers = {who: outcome for who, outcome in outcomes.items() if who not in (OURS, OURS_DENSE)}
    for who, outcome in peers.items():
        findings.times(
            f"Q-GaLore step, {name}", ours.median(ORDINARY), outcome.median(ORDINARY), who
        )
    for kind in (FIRST, REFRESH):
        text = f"{number(1e3 * ours.median(kind))} ms"
        findings.row(f"Q-GaLore {kind} of all matrices, {name}", text)
    for who, outcome in peers.items():
        if ours.peak[ORDINARY]:
            mine, theirs = ours.peak[ORDINARY], outcome.peak[ORDINARY]
            findings.row(
                f"peak memory of a step, {name}",
                _gibibytes(mine),
                f"{_gibibytes(theirs)}, {who}",
                f"{number(theirs / mine)}x",
            )


def _gibibytes(count: int) -> str:
    return f"{number(count / 2**30)} GiB"


def _table(title: str, outcomes: dict[str, Outcome]) -> Table:
    head = (
        *("optimizer", "ms, median", "ms, min", "x", "refresh, ms", "first, ms"),
        *("weights, GiB", "states, GiB", "peak, GiB", "peak in a refresh, GiB"),
    )
    ours = outcomes[OURS].median(ORDINARY)
    rows = []
    for name, outcome in outcomes.items():
        median = outcome.median(ORDINARY)
        rare = [_median_or_dash(outcome, kind) for kind in (REFRESH, FIRST)]
        peaks = [outcome.peak.get(kind, 0) for kind in (ORDINARY, REFRESH)]
        sizes = [number(count / 2**30) if count else "-" for count in (*outcome.held, *peaks)]
        least = number(1e3 * min(outcome.seconds[ORDINARY]))
        rows.append((name, number(1e3 * median), least, number(median / ours), *rare, *sizes))
    notes = (
        "`ms` is an ordinary step alone on an idle card, from the call to the end of its last"
        f" kernel, on bfloat16 gradients that are new in every step; `x` is over `{OURS}`."
        " `peak` is the most that tensors held in such a step, weights, gradients and states"
        " included. There is no forward pass.",
        "The peers' subspaces are unit vectors here, which changes no ordinary step: finding them"
        " takes a full decomposition of every matrix, which is timed below, for fewer of them.",
    )
    return Table(title, head, rows, notes)


def _median_or_dash(outcome: Outcome, kind: str) -> str:
    return number(1e3 * outcome.median(kind)) if outcome.seconds.get(kind) else "-"


def _refresh_table(title: str, refreshes: dict[str, list[float]]) -> Table:
    rows = []
    for name, (cold, *warm) in refreshes.items():
        text = number(1e3 * statistics.median(warm)) if warm else "-"
        rows.append((name, number(1e3 * cold), text, str(1 + len(warm))))
    head = ("optimizer", "ms, from nothing", "ms, from an earlier basis", "steps")
    notes = (
        "Whole steps in which the subspaces of all matrices are found anew; galore_torch begins"
        " anew each time, so that its first is like any other.",
    )
    return Table(title, head, rows, notes)
