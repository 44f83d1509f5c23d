"""Integers with scales: quantizing single tensors."""

from gradpress.quant._tensor import QuantizedTensor, quantize

__all__ = ["QuantizedTensor", "quantize"]
