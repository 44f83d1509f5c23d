"""Modules and parameters: weights that are stored as integers and train like floats."""

from gradpress.nn import _linear  # noqa: F401, registered when imported
from gradpress.nn._checkpoint import CheckpointedBlocks, checkpoint_blocks_
from gradpress.nn._chunked_loss import chunked_cross_entropy
from gradpress.nn._chunked_model import ChunkedLoss, chunk_loss_
from gradpress.nn._model import (
    dequantize_,
    flatten_state_dict,
    load_flat_state_dict_,
    quantize_,
)
from gradpress.nn._weight import QuantizedWeight
from gradpress.nn.weight_norm import (
    WeightNormalizedLinear,
    add_weight_normalized_adapters_,
    merge_weight_normalized_,
    weight_normalize_,
)

__all__ = [
    "CheckpointedBlocks",
    "ChunkedLoss",
    "QuantizedWeight",
    "WeightNormalizedLinear",
    "add_weight_normalized_adapters_",
    "checkpoint_blocks_",
    "chunk_loss_",
    "chunked_cross_entropy",
    "dequantize_",
    "flatten_state_dict",
    "load_flat_state_dict_",
    "merge_weight_normalized_",
    "quantize_",
    "weight_normalize_",
]
