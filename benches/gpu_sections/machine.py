"""The machine, the card, and the versions."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch

from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.report import origin, versions
from gradpress import environment


def run(context: Context, findings: Findings) -> None:
    """Collects the facts; raises where the card cannot be used."""
    machine = environment.report()
    findings.facts = [list(fact) for fact in origin()]
    if context.on_card:
        findings.facts += _card(context)
        torch.ones(1, device=context.device).add_(1)
        context.synchronize()
    else:
        findings.facts.append(["card", "none: CPU dry run"])
    findings.facts += [
        ["CPU", machine.processor],
        ["cores", str(machine.cores)],
        ["load average at the beginning", f"{os.getloadavg()[0]:.2f}"],
        ["CUDA kernels", machine.cuda_status],
        ["versions", f"Python {machine.versions['Python']}, {versions()}"],
    ]
    findings.save()


def _card(context: Context) -> list[list[str]]:
    card = torch.cuda.get_device_properties(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    size = f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of them free at the beginning"
    level2 = getattr(card, "L2_cache_size", 0) / 2**20
    return [
        ["card", f"{card.name} (sm_{card.major}{card.minor})"],
        ["card's memory", size],
        ["multiprocessors, L2", f"{card.multi_processor_count}, {level2:.0f} MiB"],
        ["driver, CUDA of torch", f"{_driver()}, {torch.version.cuda}"],
    ]


def _driver() -> str:
    try:
        call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(call, capture_output=True, text=True, timeout=20, check=True).stdout
        return text.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "unknown"
