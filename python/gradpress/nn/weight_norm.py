"""Linear layers whose weights are magnitudes times directions, to fine-tune or to pre-train.

Salimans, Kingma: "Weight Normalization" (2016, arXiv 1602.07868); with low-rank adapters inside
of the norm: Liu et al.: "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024, arXiv 2402.09353);
Huang, Shen, Zhu, Rudinac, Kanoulas: "Gradient Weight-normalized Low-rank Projection for Efficient
LLM Training" (AAAI 2025, arXiv 2412.19616), whose weights these are;
:class:`gradpress.optim.GradNormLoRP` steps them.

Differences from the paper's code (Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection...):
there the optimizer takes weights apart, keeps a copy of each, and sets the magnitudes back before
every step, so that they never learn; the gradient lacks its part along the rows; and a row of
zeros becomes NaN. Here magnitudes and directions are parameters of the model, and gradients are
exact.

Differences from `torch.nn.utils.parametrizations.weight_norm` (with ``dim=0``), which has the same
formula as :func:`weight_normalize_`: there rows of zeros become NaN, and every layer's W is held
from the forward to the backward pass, as large as the weights once more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from gradpress.nn._select import Targets, select_linear
from gradpress.nn._weight_norm_function import (
    TINY,
    adapted_row_norms,
    arithmetic_dtype,
    dense_values,
    normalized_linear,
    row_norms,
    scale_channels,
)

ModelT = TypeVar("ModelT", bound=nn.Module)


class WeightNormalizedLinear(nn.Module):
    r"""A Linear layer whose weight's rows have learned norms and learned directions.

    .. math::
        W = \mathrm{diag}(M)\, V / \lVert V\rVert_{rows}, \qquad
        V = W_0 + \tfrac{\alpha}{r} I J

    With a rank, :math:`W_0` is frozen and I, J and M are trained: equation (3.2) of the paper with
    DoRA's norms over the inputs. Without, V itself is trained, and M. In both cases the layer
    begins as what it replaces: M holds the rows' norms, and I zeros.

    Gradients are exact: with dW of W, :math:`dM_i = \langle dW_i, V_i\rangle/\lVert V_i\rVert` and
    :math:`dV_i = M_i/\lVert V_i\rVert\,(dW_i - dM_i V_i/\lVert V_i\rVert)`, orthogonal to
    :math:`V_i`. A row of zeros gives zeros and has no gradient.

    Memory from the forward to the backward pass, beside the input: with a rank, the output before
    its scaling, ``[..., rank]`` numbers, and a norm for each row (dM comes from the activations,
    and dW never exists); without, a norm for each row. Of V and W some rows exist at a time. A
    quantized weight is dequantized for a product and then dropped, one layer at a time.

    Args:
        linear: What it replaces. Its weight (a :class:`QuantizedWeight` too) and its bias are
            taken over, not copied; with a rank, the weight is frozen.
        rank: Of the adapter; None trains the weight itself.
        alpha: The adapter is multiplied by ``alpha / rank``.
        dropout: Probability with which the adapter does not see an input, while training.
        detach_norm: Take :math:`\lVert V\rVert` for a constant in the gradient of I and J, as DoRA
            does (its section 4.3) to save memory and time.

    Attributes:
        direction: ``[m, n]``: W0 or V.
        magnitude: ``[m]``, at least float32.
        lora_A: ``[rank, n]`` (J), at least float32, Kaiming-uniform; None without a rank.
        lora_B: ``[m, rank]`` (I), at least float32, zeros; None without a rank.
        bias: As it was.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from gradpress.nn.weight_norm import WeightNormalizedLinear
        >>> layer = WeightNormalizedLinear(torch.nn.Linear(32, 16), rank=4)
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['magnitude', 'lora_A', 'lora_B', 'bias']
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int | None = None,
        alpha: float = 16.0,
        dropout: float = 0.0,
        detach_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_options(rank, alpha, dropout)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.detach_norm = rank, detach_norm
        self.scaling = 0.0 if rank is None else alpha / rank
        weight = linear.weight
        self.direction = weight
        trained = weight.requires_grad or rank is not None
        self.magnitude = nn.Parameter(row_norms(weight), requires_grad=trained)
        self.lora_A: nn.Parameter | None
        self.lora_B: nn.Parameter | None
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        if rank is not None:
            weight.requires_grad_(False)
            # As the magnitude: in the dtype of arithmetic, and where the weight is.
            self.lora_A = nn.Parameter(self.magnitude.new_empty(rank, self.in_features))
            self.lora_B = nn.Parameter(self.magnitude.new_zeros(self.out_features, rank))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.dropout = nn.Dropout(dropout)
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias`` for ``[..., n]``; dropout in the adapter's branch only."""
        a, b = self.lora_A, self.lora_B
        if a is None or b is None:
            return normalized_linear(x, self.direction, self.magnitude, self.bias)
        down = F.linear(self.dropout(x), a.to(x.dtype))
        up = F.linear(down, b.to(x.dtype))
        z = torch.add(F.linear(x, self.direction), up, alpha=self.scaling)
        return scale_channels(z, self.magnitude / self._norms(), self.bias)

    def _norms(self) -> torch.Tensor:
        """Of V's rows, at least `TINY`."""
        a, b = self.lora_A, self.lora_B
        if a is None or b is None or self.detach_norm:
            norms = row_norms(self.direction, a, b, self.scaling)
        else:
            norms = adapted_row_norms(self.direction, a, b, self.scaling)
        return norms.clamp_min(TINY)

    @property
    def weight(self) -> torch.Tensor:
        """W, computed anew: dense, in the dtype of the weight it replaces, without a gradient."""
        with torch.no_grad():
            dtype = arithmetic_dtype(self.direction)
            values = dense_values(self.direction, dtype)
            if self.lora_A is not None and self.lora_B is not None:
                a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
                values = torch.addmm(values, b, a, alpha=self.scaling)
            scaled = values * (self.magnitude / self._norms())[:, None]
            return scaled.to(self.direction.dtype)

    def merge(self) -> nn.Linear:
        """A plain Linear module with the same output; it has a dense weight, trainable."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and options."""
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        if self.rank is None:
            return text
        return f"{text}, rank={self.rank}, scaling={self.scaling}, detach_norm={self.detach_norm}"


def add_weight_normalized_adapters_(
    model: ModelT,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Targets = None,
    detach_norm: bool = False,
) -> ModelT:
    """Freezes the weights of Linear modules and gives them adapters and magnitudes, in place.

    Each module becomes a :class:`WeightNormalizedLinear`; the model's outputs stay the same. All
    other parameters stay as trainable as they are. Call :func:`quantize_` before, where the frozen
    weights shall be integers, and :func:`gradpress.optim.gradnormlorp_groups` after.

    Args:
        model: Changed in place. Call this before the optimizer is made.
        rank: Of the adapters.
        alpha: The adapters are multiplied by ``alpha / rank``.
        dropout: In the adapters' branch.
        target_modules: None or ``"all-linear"``: every Linear module but the output head and
            shared weights; otherwise names, parts of names or regular expressions. Instances of
            subclasses of ``nn.Linear`` are left alone: their owners may use the weight directly.
        detach_norm: See :class:`WeightNormalizedLinear`.

    Returns:
        The model itself.

    Raises:
        ValueError: no module matches, or an option is out of its range; the model is unchanged
            then.

    Example:
        >>> import torch
        >>> from gradpress.nn.weight_norm import add_weight_normalized_adapters_
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 4))
        >>> add_weight_normalized_adapters_(model, rank=4, target_modules="0")[0]
        WeightNormalizedLinear(
          32, 16, bias=True, rank=4, scaling=4.0, detach_norm=False
          (dropout): Dropout(p=0.0, inplace=False)
        )
    """
    _check_options(rank, alpha, dropout)
    _replace_linear(
        model,
        _linear_modules(model, target_modules),
        lambda linear: WeightNormalizedLinear(linear, rank, alpha, dropout, detach_norm),
    )
    return model


def weight_normalize_(model: ModelT, target_modules: Targets = None) -> ModelT:
    """Divides the weights of Linear modules into magnitudes and directions, in place.

    Each module becomes a :class:`WeightNormalizedLinear` without an adapter: its weight is the
    trainable ``direction``, and the norms of its rows are the trainable ``magnitude``. The
    model's outputs stay the same. The layer does not notice the directions' lengths, so that
    weight decay acts through the magnitudes.

    Args:
        model: Changed in place. Call this before the optimizer is made.
        target_modules: As for :func:`add_weight_normalized_adapters_`.

    Returns:
        The model itself.

    Raises:
        ValueError: no module matches; the model is unchanged then.

    Example:
        >>> import torch
        >>> from gradpress.nn.weight_norm import weight_normalize_
        >>> model = weight_normalize_(torch.nn.Sequential(torch.nn.Linear(32, 16)))
        >>> [(name, list(p.shape)) for name, p in model.named_parameters()]
        [('0.direction', [16, 32]), ('0.magnitude', [16]), ('0.bias', [16])]
    """
    _replace_linear(model, _linear_modules(model, target_modules), WeightNormalizedLinear)
    return model


def merge_weight_normalized_(model: ModelT) -> ModelT:
    """Turns every :class:`WeightNormalizedLinear` of a model into a plain Linear module, in place.

    Outputs stay the same (those of an evaluation, where there is dropout). Weights become dense;
    :func:`quantize_` makes them integers again, with a rounding of its own.

    Args:
        model: Changed in place; a model without such modules stays what it is.

    Returns:
        The model itself.

    Raises:
        ValueError: `model` is itself a WeightNormalizedLinear; call its `merge`.
    """
    if isinstance(model, WeightNormalizedLinear):
        raise ValueError(
            "merge_weight_normalized_: model must contain WeightNormalizedLinear modules, got one;"
            " its merge() returns the Linear module"
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, WeightNormalizedLinear)}
    _replace(model, {id(layer): layer.merge() for layer in layers.values()})
    return model


def _check_options(rank: int | None, alpha: float, dropout: float) -> None:
    if rank is not None and rank < 1:
        raise ValueError(f"WeightNormalizedLinear: rank must be at least 1, got {rank}")
    if not math.isfinite(alpha):
        raise ValueError(f"WeightNormalizedLinear: alpha must be finite, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"WeightNormalizedLinear: dropout must be in [0, 1), got {dropout}")


def _linear_modules(model: nn.Module, target_modules: Targets) -> dict[str, nn.Linear]:
    if isinstance(model, nn.Linear):
        raise ValueError(
            "weight normalization: model must contain Linear modules, got one; pass it to"
            " WeightNormalizedLinear"
        )
    chosen = select_linear(model, target_modules)
    plain = {name: module for name, module in chosen.items() if type(module) is nn.Linear}
    if not plain:
        raise ValueError("weight normalization: model has no plain Linear module that is meant")
    return plain


def _replace_linear(
    model: nn.Module,
    chosen: dict[str, nn.Linear],
    make: Callable[[nn.Linear], WeightNormalizedLinear],
) -> None:
    layers = {name: make(linear) for name, linear in chosen.items()}
    known = {name: m for name, m in layers.items() if not m.magnitude.is_meta}
    dead = [name for name, layer in known.items() if (layer.magnitude == 0).any()]
    if dead:
        warnings.warn(
            f"weight normalization: {len(dead)} weights ({dead[0]} first) have rows of zeros,"
            " which have no direction and will not learn",
            stacklevel=3,
        )
    _replace(model, {id(linear): layers[name] for name, linear in chosen.items()})


def _replace(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Puts modules in the places of others, given by identity, wherever these stand."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])
