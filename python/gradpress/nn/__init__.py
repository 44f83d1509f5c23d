"""Modules and parameters: weights that are stored as integers and train like floats."""

from gradpress.nn._model import (
    dequantize_,
    flatten_state_dict,
    load_flat_state_dict_,
    quantize_,
)
from gradpress.nn._weight import QuantizedWeight

__all__ = [
    "QuantizedWeight",
    "dequantize_",
    "flatten_state_dict",
    "load_flat_state_dict_",
    "quantize_",
]
