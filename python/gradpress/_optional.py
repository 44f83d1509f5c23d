"""Modules that the package can do without."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, method: str) -> Any:
    """Imports a module of the extra ``plot``.

    Args:
        module: Its name.
        method: Who needs it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{method}: needs {package}, which is not installed: pip install "gradpress[plot]"'
        ) from error
