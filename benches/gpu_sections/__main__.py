"""Runs sections in this process: `python -m benches.gpu_sections NAME...`; see `benches/gpu.py`."""

from __future__ import annotations

import argparse
import gc
import importlib
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from benches.gpu_sections import SECTIONS
from benches.gpu_sections.context import Context
from benches.gpu_sections.findings import Findings


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_sections", description=__doc__)
    parser.add_argument("names", nargs="+", choices=SECTIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, required=True, help="until the process is ended")
    parser.add_argument("--folder", type=Path, required=True, help="for findings and logs")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the sections, each into a file of its own; one that fails does not stop the next."""
    options = _parse(arguments)
    # As an exception, on whose way out the processes that a section started are ended, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = time.monotonic() + options.seconds
    context = Context(torch.device(options.device), options.quick, deadline, options.folder)
    code = 0
    for name in options.names:
        findings = Findings(options.folder / f"{name}.json", dry=not context.on_card)
        torch.manual_seed(0)
        findings.save()
        try:
            section = importlib.import_module(f"benches.gpu_sections.{name}")
            # What modules hold stays: collections, of which there are many, need not look at it.
            gc.collect()
            gc.freeze()
            section.run(context, findings)
            findings.finished = True
        except Exception as error:
            traceback.print_exc()
            findings.error = f"{type(error).__name__}: {error}"[:1000]
            code = 1
        findings.save()
        context.release()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
