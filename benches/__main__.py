"""Command line of the benchmarks; see README.md beside this file."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys

BENCHES = {
    "border": "cost of a call into the native core, one tensor and lists of them",
    "quantize": "INT8, INT4, dynamic map and stochastic bfloat16, and back",
    "subspace": "finding the leading subspace of a gradient",
    "adamw8bit": "AdamW with small moments",
    "qgalore_step": "a whole Q-GaLore step on a LLaMA",
    "pruning": "which weights stay, and SparseGPT's solve",
    "pruned_model": "perplexity of SmolLM2-135M after pruning (an hour)",
    "agreement": "how far the optimizers end from their originals",
    "optimizers": "the rest of the family beside the packages that offer the same",
    "pretraining": "validation loss of every optimizer on a LLaMA of 9M (an hour)",
    "finetuning": "validation loss of fine-tuning SmolLM2-135M (an hour)",
    "factors": "projected gradients from activations, and from gradients",
    "least_memory": "peak bytes and seconds of training steps (10 minutes)",
    "plan_7b": "memory of LLaMA-7B by category, without allocating it",
    "rounding": "validation loss with INT8 weights: stochastic and nearest rounding (20 minutes)",
}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    parser.add_argument("name", nargs="?", choices=[*BENCHES, "all"])
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--threads", type=int, help="threads of every contender (all cores)")
    parser.add_argument("--repeats", type=int, help="timed rounds (each benchmark has its own)")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--write", action="store_true", help="write benches/results/NAME.md")
    options = parser.parse_args(arguments)
    if not options.list and options.name is None:
        parser.error("give a name, 'all', or --list")
    for name in ("threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def _run_all(arguments: list[str]) -> int:
    """Runs every benchmark in a process of its own, so that none inherits another's memory."""
    rest = [a for a in arguments if a != "all"]
    codes = [subprocess.call([sys.executable, "-m", "benches", name, *rest]) for name in BENCHES]
    return max(codes)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main(arguments: list[str]) -> int:
    """Runs what the arguments ask for."""
    options = _parse(arguments)
    if options.list:
        for name, text in BENCHES.items():
            print(f"{name:<14}{text}")
        return 0
    if options.name == "all":
        return _run_all(arguments)
    threads = options.threads or _cores()
    # OpenMP reads these once: they have to stand before the first import of torch.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    report = importlib.import_module("benches.report")
    bench = importlib.import_module(f"benches.{options.name}")
    report.run(options.name, bench.run, threads, options.repeats, options.quick, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
