"""What training takes: counted, predicted before anything exists, and measured."""

from gradpress.memory._compare import Comparison, compare
from gradpress.memory._count import MemoryCount, count
from gradpress.memory._creations import Creation
from gradpress.memory._plan import MemoryPlan, plan
from gradpress.memory._watch import Watch, watch

__all__ = [
    "Comparison",
    "Creation",
    "MemoryCount",
    "MemoryPlan",
    "Watch",
    "compare",
    "count",
    "plan",
    "watch",
]
