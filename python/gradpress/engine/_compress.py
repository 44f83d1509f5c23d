"""One entry point for all compressors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradpress.engine._batches import Batch, Loss, causal_loss, read_calibration
from gradpress.engine._recipe import Recipe
from gradpress.engine._report import CompressionReport
from gradpress.engine._work import Options, Work

_OP = "compress"


def compress(
    model: nn.Module,
    recipe: Recipe | Sequence[Recipe],
    *,
    calibration: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    resume: str | os.PathLike[str] | None = None,
    gradient_memory: int | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compresses a model in place, block by block.

    The repeated blocks are found in the model: the lists of modules that cut the weights meant into
    the smallest parts. Each is run on all calibration batches, with whatever arguments the model
    gives it, while statistics of its layers' inputs are collected; its layers are compressed; and
    it runs once more for what the next block will be given. Between blocks nothing is kept but
    those inputs. Where blocks do not simply follow each other, the whole model runs for each of
    them: right, but slower. A model without such lists counts as one block. Layers outside of the
    blocks come last. Layers are modules: experts that are fused into one parameter stay as they
    are.

    Gradients, where a recipe uses them, are those of the model as it is before, sample by sample.
    They are reduced when they arrive; gradients of different layers never exist together.

    The model is in evaluation mode while this runs, without a cache of keys and values, and in its
    own mode afterwards. When something fails, finished layers stay compressed.

    Args:
        model: Any module; its weights are changed in place.
        recipe: What to do, such as ``gradpress.prune.GBLM(sparsity=0.5)``; several are applied one
            after the other.
        calibration: Batches of inputs: tensors, mappings of keyword arguments (padding that an
            ``attention_mask`` ``[samples, tokens]`` marks with zeros is left out of the
            statistics of layers whose inputs have these first dimensions, or as many rows), or
            tuples of positional ones. The first dimension counts samples. A list of all of them is
            kept. Not needed by recipes that look at nothing but weights.
        loss: From model and batch to a scalar, for recipes that use gradients. Left out: the
            model's own loss, with the batch's ``labels``, or those of predicting the next token.
        resume: A folder. Finished blocks are written to it, and taken from it when the same model,
            recipe and calibration come again, after a kill, say. It is not removed at the end.
        gradient_memory: Bytes that statistics of gradients may take, 4 for each weight. Left out,
            those of all layers are collected in one go; otherwise those of as many blocks as fit,
            and the batches run forward and backward once for each such group. Not below what one
            block needs.
        progress: Show a progress bar.

    Returns:
        A report with a row for each layer; prints as a table.

    Raises:
        TypeError: `recipe` is no recipe, or `calibration` holds no batches.
        ValueError: no layer is meant; or an option does not fit the model, the recipe, or the
            folder.

    Example:
        >>> import torch, gradpress
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
        >>> batches = [torch.randn(8, 16) for _ in range(4)]
        >>> recipe = gradpress.prune.Wanda(pattern="2:4")
        >>> report = gradpress.compress(model, recipe, calibration=batches, progress=False)
        >>> report.sparsity
        0.5
        >>> int((model[0].weight == 0).sum())
        128
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a module, got {type(model).__name__}")
    recipes = _read_recipes(recipe)
    if loss is not None and not callable(loss):
        raise TypeError(
            f"{_OP}: loss must be a function of model and batch, got {type(loss).__name__}"
        )
    if gradient_memory is not None and gradient_memory < 1:
        raise ValueError(f"{_OP}: gradient_memory must be at least 1, got {gradient_memory}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    read = None
    if calibration is not None or any(one.needs_calibration for one in recipes):
        read = read_calibration(_OP, calibration, device)
    options = Options(loss or causal_loss, gradient_memory, progress)
    started = time.perf_counter()
    reports = []
    with _quiet(model), torch.inference_mode(False), torch.no_grad():
        for i, one in enumerate(recipes):
            folder = None if resume is None else os.path.join(resume, str(i))
            reports.append(Work(model, one, read, options).run(folder))
    return CompressionReport(
        tuple(row for report in reports for row in report.rows),
        time.perf_counter() - started,
        max(report.statistics_bytes for report in reports),
        max(report.stream_bytes for report in reports),
    )


def _read_recipes(recipe: Recipe | Sequence[Recipe]) -> list[Recipe]:
    if not isinstance(recipe, Recipe | Sequence):
        found = recipe.__name__ if isinstance(recipe, type) else type(recipe).__name__
        raise TypeError(f"{_OP}: recipe must be a recipe or several, got {found}")
    recipes = [recipe] if isinstance(recipe, Recipe) else list(recipe)
    for i, one in enumerate(recipes):
        if not isinstance(one, Recipe):
            raise TypeError(f"{_OP}: recipe[{i}] must be a recipe, got {type(one).__name__}")
    if not recipes:
        raise ValueError(f"{_OP}: recipe must be a recipe or several, got none")
    return recipes


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, layers that are really called, and no cache that a second run finds filled.

    PyTorch's own encoder layers have a fast path around the modules in them.
    """
    modes = [(module, module.training) for module in model.modules()]
    # A model may be a part of another one, and its configuration of another configuration.
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is not None:
            configs[id(config)] = config
    cached = {key: config.use_cache for key, config in configs.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for key, config in configs.items():
            config.use_cache = cached[key]
        for module, training in modes:
            module.training = training
