"""How long the kernels take to compile, and to come from the cache."""

from __future__ import annotations

import subprocess
import sys
import time

import torch

import gradpress
from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.tables import number
from gradpress.ops import runtime

#: In a process of its own, since loaded modules stay loaded.
_AGAIN = """
import time, torch, gradpress
torch.ones(1, device="cuda").add_(1)
torch.cuda.synchronize()
start = time.perf_counter()
gradpress.warmup()
torch.cuda.synchronize()
print("seconds", time.perf_counter() - start)
"""


def run(context: Context, findings: Findings) -> None:
    """Fills the cache, which is empty before; every later section profits."""
    if not context.on_card:
        _dry(findings)
        return
    torch.ones(1, device=context.device).add_(1)
    context.synchronize()
    start = time.perf_counter()
    gradpress.warmup(context.device)
    context.synchronize()
    cold = time.perf_counter() - start
    modules = len(runtime.kernel_modules())
    findings.row(f"warmup(), {modules} modules, nothing cached", f"{number(cold)} s")
    done = subprocess.run(
        [sys.executable, "-c", _AGAIN],
        capture_output=True,
        text=True,
        timeout=max(context.left() - 2, 1),
        check=False,
    )
    words = done.stdout.split()
    if done.returncode or len(words) != 2:
        raise RuntimeError(f"warmup() from the cache failed: {done.stderr[-500:]}")
    findings.row(f"warmup(), {modules} modules, from the cache", f"{number(float(words[1]))} s")


def _dry(findings: Findings) -> None:
    """One module, compiled for an architecture of which there is no card."""
    for name in ("nothing cached", "from the cache"):
        start = time.perf_counter()
        try:
            runtime.compile_kernels("sm_75", ["update.cu"])
        except RuntimeError as error:
            findings.note(f"Nothing is compiled here: {error}")
            return
        findings.row(f"one module, {name}", f"{number(time.perf_counter() - start)} s")
