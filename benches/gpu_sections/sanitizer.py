"""A few small steps under compute-sanitizer: memory, races, memory that nobody wrote."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Set
from pathlib import Path

from benches.gpu_sections import small_steps
from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.gpu_sections.processes import run_limited
from benches.gpu_sections.profiling import own_kernels

TOOLS = ("memcheck", "racecheck", "initcheck")
ROOT = Path(__file__).parents[2]
_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")
#: Errors that are printed, and so can be told apart by kernel.
_PRINTED = 1000
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_WORD = re.compile(r"[A-Za-z_]\w*")
#: Seconds below which a tool is not started.
_LEAST = 15


def run(context: Context, findings: Findings) -> None:
    """Runs the tools one after another, each with its share of the time that is left."""
    if not context.on_card:
        for what, right in small_steps.few(context.device):
            findings.check(what, right)
        findings.note("compute-sanitizer needs a card; the small steps were run without it.")
        return
    sanitizer = _find()
    if sanitizer is None:
        findings.row("compute-sanitizer", "not found", target="0 errors")
        findings.note("compute-sanitizer comes with the CUDA toolkit; it is not on the PATH.")
        return
    for index, tool in enumerate(TOOLS):
        seconds = (context.left() - 2) / (len(TOOLS) - index)
        if seconds < _LEAST:
            findings.row(f"compute-sanitizer {tool}", "no time", target="0 errors")
            continue
        _run_tool(context, findings, sanitizer, tool, seconds)


def _find() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("PATH", ""), *([f"{home}/bin"] if home else []), *_PLACES]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def _run_tool(
    context: Context, findings: Findings, sanitizer: str, tool: str, seconds: float
) -> None:
    command = [sanitizer, "--tool", tool, "--print-limit", str(_PRINTED), "--show-backtrace", "no"]
    if tool == "memcheck":  # torch probes for what it can do by calls that fail
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", "benches.gpu_sections.small_steps", str(context.device)]
    # Without a cache every tensor is an allocation of its own, whose ends the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = context.folder / f"sanitizer-{tool}.log"
    code = run_limited(command, log, seconds, environment, ROOT)
    output = log.read_text(encoding="utf-8", errors="replace")
    name = f"compute-sanitizer {tool}"
    total = summary(output)
    own = len(reports(output, own_kernels()))
    if total is None:
        why = f"ended after {seconds:.0f} s" if code is None else f"exit status {code}"
        # What was printed until then counts all the same.
        findings.row(name, f"{why}, {own} errors of ours", target="0 errors of ours")
        findings.note(f"{name}: {_tail(output)}")
    else:
        others = f", {total} in all" if total != own else ""
        met = own == 0
        findings.row(name, f"{own} errors of ours{others}", target="0 errors of ours", met=met)
    if own:
        findings.check(f"{name}: {reports(output, own_kernels())[0][:500]}", right=False)
    if code and "wrong: " in output:
        findings.check(f"{name}: the steps under it disagree with the CPU", right=False)


def summary(output: str) -> int | None:
    """The number of errors that the tool counted, or None where it did not come to its end."""
    found = _SUMMARY.findall(output)
    return sum(int(errors or hazards) for errors, hazards in found) if found else None


def reports(output: str, kernels: Set[str]) -> list[str]:
    """The errors that name one of some kernels, as the tool printed them."""
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    blocks: list[list[str]] = [[]]
    for line in lines:
        text = line.lstrip("=")
        # An error begins one column from the mark, what belongs to it is indented further; where
        # one ends there may be a mark alone.
        if not text.strip() or not text.startswith("  "):
            blocks.append([])
        blocks[-1].append(text.strip())
    texts = [" ".join(block).strip() for block in blocks]
    return [text for text in texts if text and kernels & set(_WORD.findall(_places(text)))]


def _places(text: str) -> str:
    """The part of an error that says where it happened."""
    _, found, rest = text.partition(" at ")
    return rest if found else ""


def _tail(output: str) -> str:
    return " ".join(output.split())[-300:] or "no output"
