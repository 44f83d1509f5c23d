"""Optimizers with small states: drop-in for `torch.optim`."""

from gradpress.optim._groups import param_groups
from gradpress.optim.adamw8bit import AdamW8bit
from gradpress.optim.qgalore import QGaLoreAdamW

__all__ = ["AdamW8bit", "QGaLoreAdamW", "param_groups"]
