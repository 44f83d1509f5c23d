"""Everything that needs a CUDA card, in one call of less than nine minutes; see README.md.

    python benches/gpu.py [--wheel FILE] [--peers FOLDER] [--out FOLDER]

Checks the kernels on the card against the CPU, measures them beside their peers, and prints one
table. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is the only one that Python looks into

from benches.gpu_sections import SECTIONS  # noqa: E402
from benches.gpu_sections.processes import run_limited  # noqa: E402
from benches.gpu_sections.report import Run, collect, logs  # noqa: E402

RESULTS = ROOT / "benches" / "results"
#: Of everything, so that it ends well inside nine minutes.
BUDGET_SECONDS = 510.0
#: Seconds below which a section is not begun.
LEAST_SECONDS = 10.0
#: For the report, and for ending a section that is over its time.
RESERVE_SECONDS = 12.0
#: Of the logs that are printed where something failed.
LOG_CHARACTERS = 6000


def main(arguments: Sequence[str]) -> int:
    """Installs, runs the sections, reports.

    Returns:
        0 where every section came to its end and nothing was wrong; missed targets do not count.
    """
    options = _parse(arguments)
    deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory(prefix="gradpress-gpu-") as scratch:
        folder = Path(scratch)
        problem = _install(options.wheel, options.peers, folder / "site")
        if problem is not None:
            print(problem, flush=True)
            return 1
        names = ["machine", *(n for n in SECTIONS if n in options.only and n != "machine")]
        # Whoever ends this early still gets what was found.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            # A dry run needs no process for each, and is over before they have started.
            for group in [names] if options.device == "cpu" else [[name] for name in names]:
                if not _run(group, options, folder, deadline):
                    break
        except KeyboardInterrupt:
            print("interrupted; what was found until now:", flush=True)
        dry = options.device == "cpu"
        run = Run(collect(folder, names, dry), dry, options.quick, options.commit)
        if not run.good():
            print(f"\n{logs(folder)[-LOG_CHARACTERS:]}", flush=True)
        print(f"\n{run.text()}\n", flush=True)
        _write(run, options, folder)
    return 0 if run.good() else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benches/gpu.py", description=__doc__)
    parser.add_argument("--wheel", type=Path, help="gradpress's wheel, or a folder with it")
    parser.add_argument("--peers", type=Path, help="folder of further wheels")
    parser.add_argument("--out", type=Path, help="folder for the result file and the logs")
    parser.add_argument("--commit", help="of these sources, where git cannot tell it")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument(
        "--only",
        type=_names,
        default=list(SECTIONS),
        metavar="NAME,...",
        help=f"of {', '.join(SECTIONS)}",
    )
    parser.add_argument("--device", default="cuda", help="'cpu' is a dry run with tiny sizes")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds in all")
    options = parser.parse_args(arguments)
    options.quick = options.quick or options.device == "cpu"
    if options.out is not None:
        options.out = options.out.resolve()
    return options


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(SECTIONS)}, got {text!r}")
    return names


def _install(wheel: Path | None, peers: Path | None, site: Path) -> str | None:
    """Unpacks wheels into a folder of their own; says what went wrong with gradpress's.

    A peer that cannot be installed is told and left out.
    """
    site.mkdir()
    if peers is not None:
        for path in sorted(peers.glob("*.whl")):
            error = None if path.name.startswith("gradpress-") else _install_one(path, site)
            if error is not None:
                print(f"{path.name} is left out: {error}", flush=True)
    if wheel is None:
        return None
    if wheel.is_dir():
        found = sorted(wheel.glob("gradpress-*.whl"), key=lambda path: path.stat().st_mtime)
        if not found:
            return f"there is no gradpress-*.whl in {wheel}"
        wheel = found[-1]
    error = _install_one(wheel, site)
    return None if error is None else f"{wheel.name} cannot be installed: {error}"


def _install_one(wheel: Path, site: Path) -> str | None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-index", "--no-compile", "--no-cache-dir", "--upgrade"]
    command += ["--target", str(site), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    if "No module named pip" not in done.stderr:
        return done.stderr.strip()[-300:]
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return None


def _run(names: Sequence[str], options: argparse.Namespace, folder: Path, deadline: float) -> bool:
    """Runs sections in one process; False where nothing more can be run."""
    label = ", ".join(names)
    allowed = deadline - time.monotonic() - RESERVE_SECONDS
    allowed = min(sum(SECTIONS[name] for name in names), allowed)
    if allowed < LEAST_SECONDS:
        print(f"{label}: skipped, no time was left", flush=True)
        return True
    print(f"{label}: at most {allowed:.0f} s", flush=True)
    command = [sys.executable, "-m", "benches.gpu_sections", *names, "--device", options.device]
    command += ["--seconds", f"{allowed:.1f}", "--folder", str(folder)]
    command += ["--quick"] if options.quick else []
    start = time.monotonic()
    log = folder / f"{names[0]}.log"
    code = run_limited(command, log, allowed, _environment(folder), ROOT)
    took = time.monotonic() - start
    ending = "done" if code == 0 else "out of time" if code is None else f"failed ({code})"
    print(f"{label}: {ending} after {took:.0f} s", flush=True)
    # Without a card every other section would fail in the same way.
    return code == 0 or "machine" not in names


def _environment(folder: Path) -> dict[str, str]:
    paths = [str(folder / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        # Empty at first, so that compiling is measured, and gone afterwards.
        "GRADPRESS_CACHE_DIR": str(folder / "cache"),
    }


def _write(run: Run, options: argparse.Namespace, folder: Path) -> None:
    """Writes the result file where it was asked for, or where results are kept."""
    target = options.out
    if target is None:
        whole = set(options.only) == set(SECTIONS)
        if run.dry or run.quick or not whole or not run.found["machine"].finished:
            print("no result file: only whole runs on a card are kept; --out FOLDER keeps any")
            return
        target = RESULTS
    target.mkdir(parents=True, exist_ok=True)
    path = target / run.file_name()
    path.write_text(run.markdown(), encoding="utf-8")
    if options.out is not None:
        (target / "gpu.log").write_text(logs(folder), encoding="utf-8")
    print(f"written: {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
