"""Factorizing matrices into few directions."""

from gradpress.lowrank._svd import svd

__all__ = ["svd"]
