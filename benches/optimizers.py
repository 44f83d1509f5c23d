"""Every other optimizer of the family beside the packages that offer the same one."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

import gradpress
from benches.harness import Case, Options, no_collection, one_round, peer
from benches.report import Report
from benches.shim import without_waiting
from benches.tables import Table, number
from benches.workloads import Gradients, llama, state_bytes
from gradpress.train.sizes import SIZES

LR = 1e-3
#: Steps from one refresh to the next, short so that both kinds are measured.
GAP = 4

Groups = list[dict[str, Any]]
Make = Callable[[Groups], torch.optim.Optimizer]

_ABOUT = (
    "Every row is `optimizer.step()` on all parameters of a float32 LLaMA, on the same gradients,"
    " which change from step to step; 32-bit moments unless the row says otherwise. Projected"
    " methods project the attention and MLP matrices and leave the rest to their own Adam."
    " `refresh` is the slowest of four steps, in which all subspaces are found anew; `x` is how"
    " many times as long the row takes as the first row of its table.",
    "A peer's own rule is run as published, with the options that make it the same method. Where"
    " it differs all the same (eps before the bias correction, full SVDs, residuals), its row"
    " times what its users get.",
)


def _ours(name: str, **options: Any) -> Make:
    return partial(getattr(gradpress.optim, name), lr=LR, **options)


def _theirs(module: str, name: str, **options: Any) -> Make | None:
    package = peer(module)
    chosen = getattr(package, name, None)
    return None if chosen is None else partial(chosen, **{"lr": LR, **options})


def _families(rank: int) -> dict[str, dict[str, tuple[Make | None, dict[str, Any] | None]]]:
    """Contenders by table: how they are made, and the options of the projected group."""
    galore = {"rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    ours = {key: value for key, value in galore.items() if key != "proj_type"}
    other = {**ours, "projection_type": "std"}
    quiet = {"no_deprecation_warning": True}
    apollo = {**galore, "proj": "random", "scale_type": "channel", "scale": 1.0}
    mini = {**apollo, "rank": 1, "scale_type": "tensor", "scale": 128.0}
    return {
        "GaLore": {
            "gradpress GaLoreAdamW": (_ours("GaLoreAdamW"), ours),
            "galore_torch GaLoreAdamW": (_theirs("galore_torch", "GaLoreAdamW", **quiet), galore),
            "pytorch_optimizer GaLore": (_theirs("pytorch_optimizer", "GaLore"), other),
        },
        "GaLore, 8-bit moments": {
            "gradpress GaLoreAdamW(state_bits=8)": (_ours("GaLoreAdamW", state_bits=8), ours),
            "galore_torch GaLoreAdamW8bit": (_theirs("galore_torch", "GaLoreAdamW8bit"), galore),
        },
        "GaLore with Adafactor": {
            "gradpress GaLoreAdafactor": (
                _ours("GaLoreAdafactor", beta1=0.9, relative_step=False, scale_parameter=False),
                ours,
            ),
            "galore_torch GaLoreAdafactor": (
                _theirs(
                    "galore_torch",
                    "GaLoreAdafactor",
                    beta1=0.9,
                    relative_step=False,
                    scale_parameter=False,
                ),
                galore,
            ),
        },
        "APOLLO": {
            "gradpress Apollo": (_ours("Apollo"), {**ours, "scale": 1.0}),
            "apollo_torch APOLLOAdamW": (_theirs("apollo_torch", "APOLLOAdamW", **quiet), apollo),
            "pytorch_optimizer APOLLO": (_theirs("pytorch_optimizer", "APOLLO"), other),
        },
        "APOLLO-Mini": {
            "gradpress ApolloMini": (_ours("ApolloMini"), {"rank": 1, "update_proj_gap": GAP}),
            "apollo_torch APOLLOAdamW, rank 1": (
                _theirs("apollo_torch", "APOLLOAdamW", **quiet),
                mini,
            ),
        },
        "Fira": {
            "gradpress Fira": (_ours("Fira"), ours),
            "pytorch_optimizer Fira": (_theirs("pytorch_optimizer", "Fira"), other),
        },
        "Subspaces that follow the gradient (no other package)": {
            "gradpress LDAdamW": (_ours("LDAdamW"), {"rank": rank}),
            "gradpress SubTrack": (_ours("SubTrack"), ours),
        },
        "diffGrad": {
            "gradpress DiffGrad(state_bits=32)": (_ours("DiffGrad", state_bits=32), None),
            "gradpress DiffGrad, 8 bits": (_ours("DiffGrad"), None),
            "pytorch_optimizer DiffGrad": (_theirs("pytorch_optimizer", "DiffGrad"), None),
        },
        "AdamP": {
            "gradpress AdamP(state_bits=32)": (_ours("AdamP", state_bits=32), None),
            "gradpress AdamP, 8 bits": (_ours("AdamP"), None),
            "adamp AdamP": (_theirs("adamp", "AdamP"), None),
            "pytorch_optimizer AdamP": (_theirs("pytorch_optimizer", "AdamP"), None),
        },
        "SGDP": {
            "gradpress SGDP(state_bits=32)": (_ours("SGDP", state_bits=32, momentum=0.9), None),
            "gradpress SGDP, 8 bits": (_ours("SGDP", momentum=0.9), None),
            "adamp SGDP": (_theirs("adamp", "SGDP", momentum=0.9), None),
            "pytorch_optimizer SGDP": (_theirs("pytorch_optimizer", "SGDP", momentum=0.9), None),
        },
    }


def run(options: Options) -> Report:
    """Times every table's contenders in turn."""
    size = "tiny" if options.quick else "60M"
    rank, rounds = SIZES[size].rank, options.rounds(3)
    torch.manual_seed(0)
    model = llama(size)
    gradients = Gradients([tuple(p.shape) for p in model.parameters()], rank // 2)
    notes, tables = [], []
    for title, makers in _families(rank).items():
        missing = [name for name, (make, _) in makers.items() if make is None]
        notes += [f"Left out: {name}, which is not installed." for name in missing]
        tables.append(_measure(title, model, makers, gradients, rounds))
    return Report("The family beside its peers", [*_ABOUT, *notes], rounds, tables)


def _measure(
    title: str,
    model: torch.nn.Module,
    makers: dict[str, tuple[Make | None, dict[str, Any] | None]],
    gradients: Gradients,
    rounds: int,
) -> Table:
    optimizers: dict[str, torch.optim.Optimizer] = {}
    cases = []
    for name, (make, low_rank) in makers.items():
        if make is None:
            continue
        own = copy.deepcopy(model)
        with warnings.catch_warnings():
            # Float32 projections are larger than 8-bit states without any, which is said.
            warnings.filterwarnings("ignore", message=".* the states of")
            optimizers[name] = make(_groups(own, low_rank, name.startswith("gradpress")))
        cases.append(Case(name, optimizers[name].step, _assign(own, gradients)))
    phases: list[dict[str, list[float]]] = [{name: [] for name in optimizers} for _ in range(GAP)]
    with no_collection(), without_waiting():
        for step in range(GAP * (1 + rounds)):
            gradients.fill()
            times = one_round(cases, step)
            if step >= GAP:
                for name, seconds in times.items():
                    phases[step % GAP][name].append(seconds)
    projected = any(low_rank is not None for _, low_rank in makers.values())
    return _table(title, optimizers, _medians(phases, optimizers), projected)


def _medians(
    phases: list[dict[str, list[float]]], names: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """Seconds of an ordinary step and of one with a refresh, which packages have at other times."""
    medians = {}
    for name in names:
        by_phase = [statistics.median(phase[name]) for phase in phases]
        slowest = by_phase.index(max(by_phase))
        others = [t for i, phase in enumerate(phases) if i != slowest for t in phase[name]]
        medians[name] = (statistics.median(others), by_phase[slowest])
    return medians


def _groups(model: torch.nn.Module, low_rank: dict[str, Any] | None, ours: bool) -> Groups:
    named = dict(model.named_parameters())
    if low_rank is None:
        return [{"params": list(named.values())}]
    groups = gradpress.optim.param_groups(model, 1, verbose=False)
    first, rest = ([p for _, p in group["params"]] for group in groups)
    # Defaults that project would reach the rest otherwise.
    plain = {"rank": None} if ours and "rank" in low_rank else {}
    return [{"params": first, **low_rank}, {"params": rest, **plain}]


def _assign(model: torch.nn.Module, gradients: Gradients) -> Callable[[], None]:
    """Sets the gradients anew each time, since one peer replaces them."""
    parameters = list(model.parameters())

    def before() -> None:
        for p, grad in zip(parameters, gradients.values, strict=True):
            p.grad = grad.clone()

    return before


def _table(
    title: str,
    optimizers: dict[str, torch.optim.Optimizer],
    medians: dict[str, tuple[float, float]],
    projected: bool,
) -> Table:
    head = ["optimizer", "ordinary, ms", "x", "states, MB"]
    if projected:
        head[3:3] = ["refresh, ms", "x"]
    first = next(iter(optimizers))
    rows = []
    for name, optimizer in optimizers.items():
        cells = []
        for seconds, of_first in list(zip(medians[name], medians[first], strict=True))[
            : 1 + projected
        ]:
            cells += [number(1e3 * seconds), number(seconds / of_first)]
        rows.append((name, *cells, number(state_bytes(optimizer) / 1e6, 4)))
    return Table(title, head, rows)
