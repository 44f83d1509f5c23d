"""Which weights stay: for single arrays, and recipes for whole models."""

from gradpress.prune._factor import inverse_factor
from gradpress.prune._gradients import GradientNorms
from gradpress.prune._masks import HeldMasks, apply_masks_, hold_masks_
from gradpress.prune._model import mask_model, select_model
from gradpress.prune._recipes import GBLM, Gradient, Magnitude, PruningRecipe, SparseGPT, Wanda
from gradpress.prune._score import (
    mask,
    score_gblm,
    score_gradient,
    score_magnitude,
    score_wanda,
    select,
)
from gradpress.prune._sparsegpt import SparseGPTResult, sparsegpt
from gradpress.prune._sparsity import ParameterSparsity, SparsityReport, sparsity
from gradpress.prune._statistics import Hessian, InputSquares
from gradpress.prune._storage import PackedSparse, pack_sparse, packed_bytes, unpack_sparse

__all__ = [
    "GBLM",
    "Gradient",
    "GradientNorms",
    "HeldMasks",
    "Hessian",
    "InputSquares",
    "Magnitude",
    "PackedSparse",
    "ParameterSparsity",
    "PruningRecipe",
    "SparseGPT",
    "SparseGPTResult",
    "SparsityReport",
    "Wanda",
    "apply_masks_",
    "hold_masks_",
    "inverse_factor",
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
    "sparsity",
    "unpack_sparse",
]
