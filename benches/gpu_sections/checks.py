"""The tests that need a card, and small optimizer steps beside the CPU's."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benches.gpu_sections import small_steps
from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings
from benches.gpu_sections.processes import run_limited

ROOT = Path(__file__).parents[2]
#: Ids of the parity tests begin with the device; those that run on the emulator need a compiler.
_PARITY = ("tests/cuda", "-k", "[cuda")
_TRAINING = ("tests/train/test_cuda.py",)
_DRY = ("tests/cuda/test_coverage.py",)
#: Packages without which the tests cannot be collected.
_NEEDED = ("pytest", "hypothesis")
_NEEDED_FOR_TRAINING = ("transformers", "tokenizers", "safetensors")
#: Seconds that the small steps and the report need afterwards.
_RESERVE = 5
_RESULT = re.compile(r"^(tests/.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def run(context: Context, findings: Findings) -> None:
    """Optimizers first, since they take seconds, then the suites."""
    try:
        for what, right in small_steps.answers(context.device):
            findings.check(what, right)
    except Exception as error:  # the suites run elsewhere, and may tell more
        findings.check(f"small steps: {type(error).__name__}: {error}", right=False)
    wrong = len(findings.wrong)
    findings.row(
        "optimizers of small models beside the CPU",
        f"{findings.right} agree, {wrong} do not",
        target="all agree",
        met=wrong == 0,
    )
    missing = _missing(_NEEDED)
    if missing:
        findings.note(
            f"The tests were not run: {', '.join(missing)} missing; benches/README.md says how to"
            " bring wheels along."
        )
        return
    _suite(context, findings, "parity suite", _PARITY if context.on_card else _DRY)
    if not context.on_card:
        return
    missing = _missing(_NEEDED_FOR_TRAINING)
    if missing:
        findings.note(f"The tests of training were not run: {', '.join(missing)} missing.")
        return
    _suite(context, findings, "training tests", _TRAINING)


def _missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _suite(context: Context, findings: Findings, what: str, selection: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pytest", *selection, "-v", "--tb=short"]
    # Neither plugins nor warnings of this machine are of interest, nor is a cache.
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "400"}
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["-p", "pytest_timeout"]
    seconds = context.left() - _RESERVE
    if seconds <= 0:
        findings.note(f"{what}: no time was left.")
        return
    log = context.folder / f"{what.replace(' ', '-')}.log"
    code = run_limited(command, log, seconds, environment, ROOT)
    output = log.read_text(encoding="utf-8", errors="replace")
    matches = filter(None, map(_RESULT.match, output.splitlines()))
    outcomes: dict[str, str] = {match[1]: match[2] for match in matches}
    counts = Counter(outcomes.values())
    passed, failed = counts["PASSED"], counts["FAILED"] + counts["ERROR"]
    skipped = f", {counts['SKIPPED']} skipped" if counts["SKIPPED"] else ""
    findings.row(
        what,
        f"{passed} passed, {failed} failed{skipped}",
        target="all pass",
        met=passed > 0 and failed == 0 and code == 0,
    )
    findings.right += passed
    for name, outcome in outcomes.items():
        if outcome in ("FAILED", "ERROR"):
            findings.check(name, right=False)
    if code is None:
        findings.note(f"{what}: ended after {seconds:.0f} s, before its last test.")
    elif code and not failed:
        findings.check(f"{what}: pytest ended with {code}: {output[-400:].strip()}", right=False)
