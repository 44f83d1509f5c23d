"""What switches off again what a function has switched on."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Handle:
    """Has a `remove`, and is a context manager that calls it at its end."""

    def remove(self) -> None:
        """Switches it off; again without effect."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Nothing: it is on already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Switches it off."""
        self.remove()
