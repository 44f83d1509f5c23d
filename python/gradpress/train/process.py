"""What the running process takes from the machine."""

from __future__ import annotations

import sys
from pathlib import Path


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, in bytes.

    Where neither psutil nor `/proc` tells, the largest value so far is given.
    """
    try:
        import psutil
    except ImportError:
        return _resident_without_psutil()
    return int(psutil.Process().memory_info().rss)


def _resident_without_psutil() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
