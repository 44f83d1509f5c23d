"""Processes that are ended, with everything they started, when their time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_GRACE_SECONDS = 5


def run_limited(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> int | None:
    """Runs a command with a time limit.

    Args:
        command: Program and arguments.
        log: Gets what it prints.
        seconds: After so long it is ended.
        environment: Its variables; those of this process when left out.
        folder: Where it runs.

    Returns:
        The exit status, or None where the time was over.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process's session: first so that it can tidy up, then without asking."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
            return
