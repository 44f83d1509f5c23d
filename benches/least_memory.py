"""Training steps in the least memory beside the ordinary ways: peak bytes and seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import gradpress
from benches import shim
from benches.harness import Options, peer
from benches.report import Report
from benches.tables import Table, number
from benches.workloads import llama
from gradpress.train.least_memory import chunked_token_losses
from gradpress.train.sizes import SIZES

LR, GROUP, BATCH, LENGTH = 1e-3, 256, 4, 256
_LEAST = "gradpress, least memory"

_ABOUT = (
    f"Whole training steps, {BATCH} x {LENGTH} random tokens, float32 activations. Peaks are the"
    " live bytes of tensors, weights and states included, as `gradpress.memory.watch` counts them"
    " over the third step; seconds are of the fourth to last step, the first with a refresh"
    " left out and told apart. The largest floating-point tensor is of the third step as well.",
    "`least memory` is INT8 weights, `materialize_gradients=False`, `fused_backward`,"
    " `checkpoint_blocks_` and `chunked_cross_entropy`; `gradpress, ordinary` the same weights"
    " and optimizer with gradients and logits as ever. galore-torch trains float32 weights; its"
    " moments and projectors are float32. q-galore-torch runs through `benches/shim.py`, with"
    " layers that dequantize their weight as its paper says.",
)


class _IntegerLinear(torch.autograd.Function):
    """The layer that q-galore-torch's paper trains with: the weight is dequantized whole."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: Any) -> torch.Tensor:
        ctx.codes = codes
        ctx.save_for_backward(x)
        return F.linear(x, _whole(codes))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        codes = ctx.codes
        gradient = grad.flatten(0, -2).T @ x.flatten(0, -2)
        codes.float_grad = gradient if codes.float_grad is None else codes.float_grad + gradient
        return grad @ _whole(codes), None


def _whole(codes: Any) -> torch.Tensor:
    groups = codes.view(-1, codes.group_size).float()
    values: torch.Tensor = ((groups - codes.zeros) * codes.scales).view(codes.shape)
    return values


class _Contender:
    """A model and what steps it.

    Attributes:
        step: One forward and backward pass with the update.
    """

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        least: bool = False,
    ) -> None:
        self.name, self.model, self.optimizer, self._least = name, model, optimizer, least
        if least:
            gradpress.nn.checkpoint_blocks_(model)
            self._handle = gradpress.optim.fused_backward(model, optimizer)

    def step(self, windows: torch.Tensor) -> None:
        if self._least:
            loss = chunked_token_losses(self.model, windows, "mean")
        else:
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            del logits
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()


def run(options: Options) -> Report:
    """Steps one contender after the other, each alone in memory."""
    sizes = ["tiny"] if options.quick else ["60M", "130M"]
    rounds = options.rounds(3)
    tables, notes = [], []
    for size in sizes:
        rows = []
        for name, make in _MAKERS.items():
            with contextlib.ExitStack() as stack:
                try:
                    contender = make(size, stack)
                except ImportError as error:
                    notes.append(f"Left out: {name}: {error}.")
                    continue
                rows.append((name, *_measure(contender, SIZES[size].vocab_size, rounds)))
            del contender
            print(rows[-1], flush=True)
        tables.append(_table(size, rows))
    return Report("Training in the least memory", [*_ABOUT, *dict.fromkeys(notes)], rounds, tables)


def _measure(
    contender: _Contender, vocabulary: int, rounds: int
) -> tuple[float, float, str, float]:
    """Peak bytes, seconds of a step, its largest tensor, seconds of the first step."""
    generator = torch.Generator().manual_seed(0)

    def windows() -> torch.Tensor:
        return torch.randint(vocabulary, (BATCH, LENGTH + 1), generator=generator)

    first = _seconds(contender, windows())
    _seconds(contender, windows())
    with gradpress.memory.watch(contender.model, contender.optimizer) as watch:
        contender.step(windows())
    largest = watch.largest_floating
    seconds = sorted(_seconds(contender, windows()) for _ in range(rounds))
    shape = "-" if largest is None else " x ".join(map(str, largest.shape))
    return watch.peak, seconds[len(seconds) // 2], shape, first


def _seconds(contender: _Contender, windows: torch.Tensor) -> float:
    start = time.perf_counter()
    contender.step(windows)
    return time.perf_counter() - start


def _ours(size: str, least: bool) -> _Contender:
    model = gradpress.nn.quantize_(_model(size), target_modules=["attn", "mlp"])
    groups = gradpress.optim.param_groups(model, SIZES[size].rank, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(
        groups, lr=LR, stagger=False, materialize_gradients=not least
    )
    return _Contender(_LEAST if least else "gradpress, ordinary", model, optimizer, least)


def _model(size: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return llama(size)


def _galore(size: str, _: contextlib.ExitStack) -> _Contender:
    module = peer("galore_torch")
    if module is None:
        raise ImportError("not installed")
    model = _model(size)
    projected, rest = _split(model)
    named = dict(model.named_parameters())
    keys = {"rank": SIZES[size].rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [
        {"params": [named[n] for n in projected], **keys},
        {"params": [named[n] for n in rest]},
    ]
    optimizer = module.GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True)
    return _Contender("galore-torch GaLoreAdamW", model, optimizer)


def _q_galore(size: str, stack: contextlib.ExitStack) -> _Contender:
    module = stack.enter_context(shim.q_galore_on_cpu())
    model = _model(size)
    projected, rest = _split(model)
    named: dict[str, Any] = dict(model.named_parameters())
    integers = {}
    for name in projected:
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        integers[name] = shim.integer_parameter(layer.weight.detach(), GROUP)
        integers[name].float_grad = None
        layer.weight = integers[name]
        layer.forward = _integer_forward(layer)
    keys = {"rank": SIZES[size].rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    quantized = {"quant": True, "quant_group_size": GROUP, "quant_n_bit": 4}
    interval = {"cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
    groups = [
        {"params": list(integers.values()), **keys, **quantized, **interval},
        {"params": [named[n] for n in rest]},
    ]
    del named
    return _Contender("q-galore-torch", model, module.QGaLoreAdamW8bit(groups, lr=LR))


def _integer_forward(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _IntegerLinear.apply(x, layer.weight)  # type: ignore[no-untyped-call]
        return product

    return forward


def _split(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """The names of the projected parameters, and of the others."""
    groups = gradpress.optim.param_groups(model, 1, verbose=False)
    projected, rest = ([name for name, _ in group["params"]] for group in groups)
    return projected, rest


_MAKERS: dict[str, Callable[[str, contextlib.ExitStack], _Contender]] = {
    _LEAST: lambda size, _: _ours(size, least=True),
    "gradpress, ordinary": lambda size, _: _ours(size, least=False),
    "galore-torch GaLoreAdamW": _galore,
    "q-galore-torch QGaLoreAdamW8bit, INT8 weights": _q_galore,
}


def _table(size: str, rows: list[tuple[str, float, float, str, float]]) -> Table:
    head = ("way", "peak, MB", "x", "step, s", "x", "first step, s", "largest float tensor")
    _, peak, seconds, *_ = rows[0]
    cells = [
        (
            name,
            number(bytes_ / 1e6, 4),
            number(bytes_ / peak),
            number(step),
            number(step / seconds),
            number(first),
            largest,
        )
        for name, bytes_, step, largest, first in rows
    ]
    return Table(f"LLaMA of {size}, rank {SIZES[size].rank}", head, cells)
