"""What training LLaMA-7B takes, by category, planned without allocating it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import gradpress
from benches.harness import Options
from benches.report import RESULTS, Report
from benches.tables import Table

BATCH, LENGTH, CHUNK = 16, 256, 512
_ABOUT = (
    f"`gradpress.memory.plan` of a training step at {BATCH} x {LENGTH} tokens in bfloat16, on the"
    " meta device: nothing of the model exists. MiB at the moment of the peak. Allocators keep"
    " more than what is live, and libraries have workspaces; neither is counted. `plan_7b.png`"
    " beside this file shows the same.",
)


def _ordinary(name: str) -> Callable[[Any], Any]:
    return lambda model: getattr(gradpress.optim, name)(model.parameters())


def _qgalore(rank: int, fused: bool, bits: int = 8, **options: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        gradpress.nn.quantize_(model, bits=bits, target_modules=["attn", "mlp"])
        groups = gradpress.optim.param_groups(model, rank=rank, verbose=False)
        optimizer = gradpress.optim.QGaLoreAdamW(groups, materialize_gradients=not fused, **options)
        if fused:
            gradpress.optim.fused_backward(model, optimizer)
        return optimizer

    return make


def run(options: Options) -> Report:
    """Plans every way."""
    size, rank = ("tiny", 64) if options.quick else ("7B", 1024)
    frugal = {"checkpointing": True, "loss_chunk": CHUNK}
    ways: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
        "AdamW8bit": (_ordinary("AdamW8bit"), frugal),
        "Q-GaLore": (_qgalore(rank, fused=False), frugal),
        "Q-GaLore, least memory": (_qgalore(rank, fused=True), frugal),
        "..., 4-bit moments": (_qgalore(rank, fused=True, state_bits=4), frugal),
        "..., and rank 512": (_qgalore(rank // 2, fused=True, state_bits=4), frugal),
        "..., and INT4 weights": (_qgalore(rank // 2, fused=True, state_bits=4, bits=4), frugal),
    }
    plans = {
        name: gradpress.memory.plan(
            size, make, batch=BATCH, sequence=LENGTH, dtype=torch.bfloat16, device="cuda", **more
        )
        for name, (make, more) in ways.items()
    }
    if not options.quick:
        figure, _ = gradpress.memory.compare(plans).plot()
        figure.savefig(RESULTS / "plan_7b.png", dpi=110, bbox_inches="tight")
    return Report(f"Memory of LLaMA-{size}", _ABOUT, 1, [_table(plans)])


def _table(plans: dict[str, Any]) -> Table:
    categories = dict.fromkeys(c for plan in plans.values() for c in plan.peak_by_category)
    rows = [
        (c, *(f"{plan.peak_by_category.get(c, 0) / 2**20:,.0f}" for plan in plans.values()))
        for c in categories
    ]
    rows.append(("**peak**", *(f"{plan.peak / 2**20:,.0f}" for plan in plans.values())))
    rows.append(("peak, GiB", *(f"{plan.peak / 2**30:.2f}" for plan in plans.values())))
    return Table("At the peak, MiB", ("", *plans), rows)
