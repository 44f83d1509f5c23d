"""Masks on the weights of a model: applied once, or held while it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradpress._handle import Handle
from gradpress.prune._parameters import Place, places, prunable

#: Where a module's parametrizations keep the order that its parameters had.
_ORDER = "parameters_before_masks"


def apply_masks_(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Sets the weights that masks drop to zero, in place.

    What is dropped becomes a positive zero whatever it was, NaN among it; what is kept keeps its
    bits. (A product with the mask would leave negative zeros, which take the space of values in
    files, and NaN.) Like any in-place operation it tells autograd that the weight has changed.

    Args:
        model: Changed in place.
        masks: bool tensors of the parameters' shapes, True where a weight is kept, on any device,
            by the names of parameters, or of modules whose `weight` is meant.

    Raises:
        TypeError: `model` is no module, a mask is no bool tensor, or a parameter is quantized or
            another kind of tensor that is not dense.
        ValueError: a name is unknown, two names mean the same parameter, a shape differs, or a
            parameter is parametrized or has no values. The model is unchanged then.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(8, 4)
        >>> mask = gradpress.prune.select(model.weight.detach(), sparsity=0.5)
        >>> gradpress.prune.apply_masks_(model, {"weight": mask})
        >>> gradpress.prune.sparsity(model).sparsity
        0.5
    """
    _apply(_resolve("apply_masks_", model, masks), masks)


def hold_masks_(model: nn.Module, masks: Mapping[str, torch.Tensor] | None = None) -> HeldMasks:
    """Keeps pruned weights at zero while a model is trained, in place.

    The masks are applied, and each weight becomes a parametrization of
    `torch.nn.utils.parametrize`: its module computes with ``where(mask, weight, 0)``, so that a
    dropped weight counts as a positive zero, and its gradient is exactly zero, whatever the
    optimizer writes there by weight decay, momentum or rounding. The parameters stay the same
    objects: an optimizer that was made before goes on. (While masks are held a module lists its
    masked parameters last, so that an optimizer that is made then numbers them in another order.)
    All modules that share a parameter get its mask.

    A masked copy of each weight exists from its forward pass to its backward pass. Masks are bool
    buffers, a byte for each element. They are part of the state dict, since a weight that is
    trained may pass through zero and zeros alone would not say which ones are dropped: to resume,
    hold any masks of the same parameters and load the state.

    Args:
        model: Changed in place.
        masks: As :func:`apply_masks_` takes them. None for the zeros that are there: of the weights
            that :func:`sparsity` counts, those with at least one zero.

    Returns:
        A :class:`HeldMasks`, whose `remove` ends it; also a context manager.

    Raises:
        TypeError, ValueError: as :func:`apply_masks_`; or `masks` is None and there are no zeros.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Linear(8, 4)
        >>> mask = gradpress.prune.select(model.weight.detach(), sparsity=0.5)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with gradpress.prune.hold_masks_(model, {"weight": mask}):
        ...     model(torch.ones(2, 8)).sum().backward()
        ...     optimizer.step()
        >>> torch.equal(model.weight != 0, mask)
        True
    """
    op = "hold_masks_"
    if masks is None:
        masks = _zeros(op, model)
    chosen = _resolve(op, model, masks)
    _apply(chosen, masks)
    owners: dict[int, list[Place]] = {}
    for place in list(places(model)):
        owners.setdefault(id(place.parameter), []).append(place)
    for name, place in chosen.items():
        kept = masks[name].detach().to(place.parameter.device, copy=True)
        mask = Masked(kept)
        for owner in owners[id(place.parameter)]:
            _register(owner, mask)
    return HeldMasks(model, [place.name for place in chosen.values()])


class Masked(nn.Module):
    """The parametrization of a weight with a mask.

    Attributes:
        kept: bool, True where the weight counts.
    """

    kept: torch.Tensor

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with positive zeros where it is dropped."""
        # Not a product: NaN times zero is NaN, in the gradient too.
        return torch.where(self.kept, weight, 0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """What is trained when the module's weight is assigned."""
        return weight


class HeldMasks(Handle):
    """The masks that a model holds; `remove` leaves its weights masked, as plain parameters.

    Also a context manager that does so at its end. :func:`hold_masks_` returns one; of a model that
    was copied, ``HeldMasks(copy)`` finds the masks.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        """Finds the masks of a model.

        Args:
            model: A model after :func:`hold_masks_`.
            names: Parameters that are meant; None for all that have masks.
        """
        self._model = model
        self._names = None if names is None else frozenset(names)

    def _places(self) -> dict[str, tuple[Place, Masked]]:
        found: dict[str, tuple[Place, Masked]] = {}
        for place in list(places(self._model)):
            mask = _mask_of(place)
            if mask is not None:
                found[place.name] = place, mask
        if self._names is None:
            return found
        held = {id(found[name][1]) for name in self._names & found.keys()}
        return {name: pair for name, pair in found.items() if id(pair[1]) in held}

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks by the names of their parameters, fit for :func:`hold_masks_`."""
        first: dict[int, tuple[str, torch.Tensor]] = {}
        for name, (_, mask) in self._places().items():
            first.setdefault(id(mask), (name, mask.kept))
        return dict(first.values())

    def remove(self) -> None:
        """Applies the masks and turns the weights back into plain parameters; again without effect.

        The parameters remain the same objects in the same memory.
        """
        for place, mask in self._places().values():
            with torch.no_grad():
                place.parameter.masked_fill_(~mask.kept, 0)
            _unregister(place, mask)


def _mask_of(place: Place) -> Masked | None:
    if not place.parametrized:
        return None
    computed: Any = place.module.parametrizations
    return next((m for m in computed[place.attribute] if isinstance(m, Masked)), None)


def _register(place: Place, mask: Masked) -> None:
    module: Any = place.module
    _own_class(module)
    order = list(module._parameters)
    # Unsafe leaves out a check that would only compute the weight once more.
    parametrize.register_parametrization(module, place.attribute, mask, unsafe=True)
    if not hasattr(module.parametrizations, _ORDER):
        setattr(module.parametrizations, _ORDER, order)


def _own_class(module: nn.Module) -> None:
    """Gives a parametrized module a class of its own.

    PyTorch keeps the properties of parametrized tensors in a class that a module shares with its
    copies: to register or to remove one would break the others.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        content = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, content)


def _unregister(place: Place, mask: Masked) -> None:
    computed: Any = place.module.parametrizations
    others = [m for m in computed[place.attribute] if m is not mask]
    if others:
        del computed[place.attribute][list(computed[place.attribute]).index(mask)]
        return
    order = getattr(computed, _ORDER)
    _own_class(place.module)
    parametrize.remove_parametrizations(place.module, place.attribute, leave_parametrized=False)
    # It comes back as the last one, and optimizers know parameters by their order.
    own = place.module._parameters
    for name in [*order, *(name for name in list(own) if name not in order)]:
        if name in own:
            own[name] = own.pop(name)


def _zeros(op: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks of the zeros that are there."""
    masks = {}
    for place in prunable(model) if isinstance(model, nn.Module) else []:
        if not place.parametrized and type(place.parameter) is nn.Parameter:
            kept = place.parameter.detach() != 0
            if not place.parameter.is_meta and not bool(kept.all()):
                masks[place.name] = kept
    if isinstance(model, nn.Module) and not masks:
        raise ValueError(f"{op}: no weight of model has zeros to hold; prune it, or give masks")
    return masks


def _apply(chosen: Mapping[str, Place], masks: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, place in chosen.items():
            parameter = place.parameter
            parameter.masked_fill_(~masks[name].to(parameter.device), 0)


def _resolve(op: str, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, Place]:
    """The parameters that masks name, checked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(masks, Mapping):
        raise TypeError(f"{op}: masks must map names to tensors, got {type(masks).__name__}")
    known = {place.name: place for place in places(model)}
    chosen: dict[str, Place] = {}
    first: dict[int, str] = {}
    for name, mask in masks.items():
        place = known.get(name) or known.get(f"{name}.weight" if name else "weight")
        if place is None:
            raise ValueError(
                f"{op}: masks must name parameters or modules with a weight, got {name!r};"
                f" model has {sorted(known)}"
            )
        _check(op, name, place, mask)
        other = first.setdefault(id(place.parameter), name)
        if other != name:
            raise ValueError(f"{op}: masks must name a parameter once, got {other!r} and {name!r}")
        chosen[name] = place
    return chosen


def _check(op: str, name: str, place: Place, mask: object) -> None:
    parameter = place.parameter
    if place.parametrized:
        held = "has a mask already" if _mask_of(place) else "is parametrized"
        raise ValueError(f"{op}: {place.name} {held}; remove its parametrization first")
    if type(parameter) is not nn.Parameter:
        raise TypeError(
            f"{op}: {place.name} must be a plain dense parameter, got {type(parameter).__name__};"
            " quantized weights are for gradpress.nn.dequantize_ first"
        )
    if parameter.is_meta:
        raise ValueError(f"{op}: {place.name} is on the meta device and has no values")
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{op}: masks[{name!r}] must be a bool tensor, got {got}")
    if mask.shape != parameter.shape:
        raise ValueError(
            f"{op}: masks[{name!r}] must have shape {list(parameter.shape)}, got {list(mask.shape)}"
        )
    if mask.is_meta:
        raise ValueError(f"{op}: masks[{name!r}] is on the meta device and has no values")
