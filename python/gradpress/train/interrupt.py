"""Ctrl-C and SIGTERM as a wish that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While the block runs, a first SIGINT or SIGTERM is remembered instead of ending the process.

    A second one ends it as usual. Outside the main thread nothing is installed, since Python
    delivers signals only there.

    Attributes:
        signal: Number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the previous handlers back."""
        self._restore()

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells count; 0 when none came."""
        return 0 if self.signal is None else 128 + self.signal

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
