"""The one error that a person at the command line is meant to read."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something that the caller asked for cannot be done; the message says what and how to fix it.

    The command line prints the message in one line and exits with code 2.
    """


class DivergedError(UserError):
    """The loss stopped being a finite number."""


def require(module: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: Dotted name, for example `"tokenizers"`.

    Returns:
        The module.

    Raises:
        UserError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{package!r} cannot be imported ({error}); install it with: "
            "pip install 'gradpress[demo]'"
        ) from error
