"""The optimizers of this package in the `Trainer` of transformers."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from gradpress import memory, optim
from gradpress.nn._select import select_linear
from gradpress.optim._base import LowBitOptimizer

if TYPE_CHECKING:
    from transformers import TrainingArguments

Pair: TypeAlias = "tuple[type[torch.optim.Optimizer], dict[str, Any]]"

#: Parameters without weight decay, as the Trainer itself tells them.
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def trainer_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    optimizer: str | type[LowBitOptimizer] = "QGaLoreAdamW",
    *,
    target_modules: str | Sequence[str] | None = None,
    **options: Any,
) -> Pair:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, with everything that `args` asks for.

    Learning rate, betas, epsilon and weight decay are those of `args`; biases and norms get no
    decay, as in the Trainer's own groups; frozen parameters are left out. Where the optimizer
    projects, the chosen Linear weights do, and nothing else.

    Args:
        model: What the Trainer trains.
        args: Its arguments. `optim_target_modules` and `optim_args` are understood as the Trainer
            documents them: all Linear layers (``"all-linear"``), one regular expression that a
            module's whole name matches, or a list of parts of names and regular expressions; and
            ``"rank=128,update_proj_gap=200,scale=0.25"``.
        optimizer: A class of :mod:`gradpress.optim`, or its name.
        target_modules: Instead of `args.optim_target_modules`. Unlike the Trainer's,
            ``"all-linear"`` and None leave out the output head and shared weights.
        **options: Further options of the optimizer; they win over `args.optim_args`.

    Returns:
        The class and its arguments.

    Raises:
        ValueError: There is no such optimizer or option, or no module matches.

    Example:
        >>> from transformers import Trainer, TrainingArguments  # doctest: +SKIP
        >>> pair = trainer_optimizer(model, args, rank=128)  # doctest: +SKIP
        >>> Trainer(model, args, optimizer_cls_and_kwargs=pair)  # doctest: +SKIP
    """
    chosen = _class_of(optimizer)
    known = _options_of(chosen)
    given = {**_parse(args.optim_args), **options}
    for name in given:
        if name not in known:
            raise ValueError(
                f"trainer_optimizer: {chosen.__name__} has no option {name}, it takes"
                f" {', '.join(sorted(known))}"
            )
    if target_modules is None:
        target_modules = args.optim_target_modules
    projected: set[int] = set()
    rank = given.pop("rank", known.get("rank"))
    if "rank" in known:
        if rank is None:
            raise ValueError("trainer_optimizer: rank must be given, as an option or in optim_args")
        projected = _projected(model, target_modules)
    shared = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    shared = {name: value for name, value in shared.items() if name in known}
    ranks = ({"rank": rank}, {"rank": None}) if "rank" in known else ({}, {})
    groups = _groups(model, projected, args.weight_decay, ranks)
    return chosen, {"params": groups, **shared, **given}


def _class_of(optimizer: str | type[LowBitOptimizer]) -> type[LowBitOptimizer]:
    if isinstance(optimizer, str):
        found = getattr(optim, optimizer, None)
        if not (isinstance(found, type) and issubclass(found, LowBitOptimizer)):
            names = [n for n in optim.__all__ if isinstance(getattr(optim, n), type)]
            raise ValueError(
                f"trainer_optimizer: optimizer must be one of {', '.join(sorted(names))}, got"
                f" {optimizer}"
            )
        return found
    return optimizer


def _options_of(chosen: type) -> dict[str, Any]:
    """Every option that the class or one of those it stands on takes by name, with its default."""
    options: dict[str, Any] = {}
    for base in chosen.__mro__:
        if base is torch.optim.Optimizer:
            break
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                options.setdefault(p.name, p.default)
    return {k: v for k, v in options.items() if k not in ("self", "params", "defaults")}


def _parse(text: str | dict[str, Any] | None) -> dict[str, Any]:
    """``"rank=64,scale=0.1,proj_type=std"`` as numbers, truths and words."""
    if not text:
        return {}
    if isinstance(text, dict):
        return dict(text)
    values: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        name, sign, word = part.partition("=")
        if not (name and sign and word):
            raise ValueError(
                f'trainer_optimizer: optim_args must be like "rank=64,scale=0.1", got {text!r}'
            )
        try:
            values[name] = ast.literal_eval(word)
        except (ValueError, SyntaxError):
            values[name] = {"true": True, "false": False, "none": None}.get(word.lower(), word)
    return values


def _projected(model: nn.Module, target_modules: str | Sequence[str] | None) -> set[int]:
    """Weights that are projected, by identity."""
    from transformers.trainer_utils import check_target_module_exists

    everything = isinstance(target_modules, str) and (
        target_modules.replace("_", "-") == "all-linear"
    )
    if target_modules is None or everything:
        modules = select_linear(model)
    else:
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        modules = {
            name: module
            for name, module in linear.items()
            if check_target_module_exists(target_modules, name)
        }
        if not modules:
            raise ValueError(
                f"trainer_optimizer: target_modules matches no Linear module, got"
                f" {target_modules!r}; there are {sorted(linear)}"
            )
    return {id(m.weight) for m in modules.values() if m.weight.requires_grad}


def _groups(
    model: nn.Module,
    projected: set[int],
    weight_decay: float,
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Groups by decay and projection, without frozen parameters and without empty groups.

    `ranks` are the options of projected weights and of all others.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    names = get_parameter_names(model, [nn.LayerNorm], list(_NO_DECAY))  # type: ignore[no-untyped-call]
    decayed = set(names)
    groups: dict[tuple[bool, bool], list[tuple[str, torch.Tensor]]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((id(p) in projected, name in decayed), []).append((name, p))
    return [
        {
            "params": named,
            "weight_decay": weight_decay if decays else 0.0,
            **ranks[0 if is_projected else 1],
        }
        for (is_projected, decays), named in sorted(groups.items(), reverse=True)
    ]


def report_callback() -> Any:
    """A callback that adds the optimizer's numbers to what the Trainer logs.

    Added are ``gradpress/state_bytes``, and, where weights are projected, ``gradpress/refreshes``
    (of all projectors together), ``gradpress/captured_energy`` (the mean share of the gradients'
    squared norm at the last refresh) and ``gradpress/rank_mean``.

    Returns:
        An instance of `transformers.TrainerCallback`, for `Trainer(callbacks=[...])`.
    """
    from transformers import TrainerCallback

    class ReportCallback(TrainerCallback):
        """Adds the optimizer's numbers to the log."""

        def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            optimizer = context.get("optimizer")
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            if not isinstance(optimizer, LowBitOptimizer) or context.get("model") is None:
                return
            numbers = _numbers(context["model"], optimizer)
            context["logs"].update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    return ReportCallback()


def _numbers(model: nn.Module, optimizer: LowBitOptimizer) -> dict[str, float]:
    counted = memory.count(model, optimizer).by_category
    states = counted.get("optimizer_states", 0) + counted.get("projectors", 0)
    numbers = {"gradpress/state_bytes": float(states)}
    rows = optimizer.report(codes=False).projected
    if rows:
        numbers["gradpress/refreshes"] = float(sum(row.refreshes for row in rows))
        energies = [row.energy for row in rows if not math.isnan(row.energy)]
        if energies:  # random projections have none
            numbers["gradpress/captured_energy"] = sum(energies) / len(energies)
        numbers["gradpress/rank_mean"] = sum(row.rank or 0 for row in rows) / len(rows)
    return numbers
