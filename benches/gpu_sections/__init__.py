"""The sections of `benches/gpu.py`: each a module with a function `run(context, findings)`.

Each section runs in a process of its own, under a time limit, and leaves what it found in a file
that is written anew after every line of it: what is cut off still has its first half.
"""

from __future__ import annotations

#: Seconds a section may take at most, in the order in which they run. The sanitizers come last,
#: since they take what time there is and no figure depends on them.
SECTIONS = {
    "machine": 90,
    "warmup": 150,
    "checks": 120,
    "bandwidth": 60,
    "optimizer": 60,
    "subspace": 70,
    "step": 120,
    "sanitizer": 180,
}
