"""Which weights stay: scores, masks, the second-order method, and packing, for single arrays."""

from gradpress.prune._gradients import GradientNorms
from gradpress.prune._model import mask_model, select_model
from gradpress.prune._score import (
    mask,
    score_gblm,
    score_gradient,
    score_magnitude,
    score_wanda,
    select,
)
from gradpress.prune._sparsegpt import SparseGPTResult, sparsegpt
from gradpress.prune._statistics import Hessian, InputSquares
from gradpress.prune._storage import PackedSparse, pack_sparse, packed_bytes, unpack_sparse

__all__ = [
    "GradientNorms",
    "Hessian",
    "InputSquares",
    "PackedSparse",
    "SparseGPTResult",
    "mask",
    "mask_model",
    "pack_sparse",
    "packed_bytes",
    "score_gblm",
    "score_gradient",
    "score_magnitude",
    "score_wanda",
    "select",
    "select_model",
    "sparsegpt",
    "unpack_sparse",
]
