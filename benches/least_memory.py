"""Training steps in the least memory beside the ordinary ways: peak bytes and seconds."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import gradpress
from benches import shim
from benches.harness import Case, Limits, Options, Samples, interleave, peer
from benches.report import Report
from benches.tables import Table, number
from benches.workloads import llama
from gradpress.train.least_memory import chunked_token_losses
from gradpress.train.sizes import SIZES

LR, GROUP = 1e-3, 256
_PASSES = "forward and backward passes alone"
_LEAST = "gradpress, least memory"
_Q_GALORE = "q-galore-torch QGaLoreAdamW8bit, INT8 weights"


class _Setting(NamedTuple):
    """What the contenders train with."""

    size: str
    batch: int
    length: int


_ABOUT = (
    "Whole training steps on random tokens, float32 activations. Peaks are the live bytes of"
    " tensors, weights and states included, as `gradpress.memory.watch` counts them over the third"
    " step, and so is the largest floating-point tensor. Seconds are of later steps, in which the"
    " contenders take turns; the first step, with the first refresh, is told apart.",
    f"`{_PASSES}` is the float32 model without an optimizer; `beyond` is the median over the rounds"
    " of what a step takes more than these passes in the same round: what a way of training costs"
    " by itself, computing activations again included.",
    "`least memory` is INT8 weights, `materialize_gradients=False`, `fused_backward`,"
    " `checkpoint_blocks_` and `chunked_cross_entropy`; `activations kept` leaves out"
    " `checkpoint_blocks_`; `gradpress, ordinary` has the same weights and optimizer with gradients"
    " and logits as ever. galore-torch trains float32 weights; its moments and projectors are"
    " float32. q-galore-torch runs through `benches/shim.py`, with layers that dequantize their"
    " weight as its paper says.",
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
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        least: bool = False,
    ) -> None:
        self.model, self.optimizer, self._least = model, optimizer, least
        if least and optimizer is not None:
            self._handle = gradpress.optim.fused_backward(model, optimizer)

    def step(self, windows: torch.Tensor) -> None:
        if self._least:
            loss = chunked_token_losses(self.model, windows, "mean")
        else:
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            del logits
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is None:
            self.model.zero_grad()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def step_next(self, windows: Iterator[torch.Tensor]) -> None:
        self.step(next(windows))


class _Memory(NamedTuple):
    """What a contender's first steps have shown."""

    peak: int
    largest: str
    first: float


def run(options: Options) -> Report:
    """Watches each contender's memory, then times them in turn."""
    if options.quick:
        settings = [_Setting("tiny", 2, 64)]
    else:
        settings = [_Setting("60M", 4, 256), _Setting("130M", 4, 256), _Setting("60M", 1, 64)]
    rounds = options.rounds(7)
    tables, notes = [], []
    for setting in settings:
        contenders: dict[str, _Contender] = {}
        memory: dict[str, _Memory] = {}
        with contextlib.ExitStack() as stack:
            for name, make in _MAKERS.items():
                try:
                    contenders[name] = make(setting.size, stack)
                except ImportError as error:
                    notes.append(f"Left out: {name}: {error}.")
                    continue
                memory[name] = _first_steps(contenders[name], setting)
                print(name, memory[name], flush=True)
            windows = _windows(setting)
            cases = [Case(name, partial(c.step_next, windows)) for name, c in contenders.items()]
            samples = interleave(cases, rounds)
            bound = _bound(contenders[_PASSES], setting, options.limits)
        tables.append(_table(setting, memory, samples, bound))
        print(tables[-1].text(), flush=True)
    return Report("Training in the least memory", [*_ABOUT, *dict.fromkeys(notes)], rounds, tables)


def _windows(setting: _Setting) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.length + 1)
    while True:
        yield torch.randint(SIZES[setting.size].vocab_size, shape, generator=generator)


def _first_steps(contender: _Contender, setting: _Setting) -> _Memory:
    windows = _windows(setting)
    start = time.perf_counter()
    contender.step(next(windows))
    first = time.perf_counter() - start
    contender.step(next(windows))
    watched = [contender.optimizer] if contender.optimizer is not None else []
    with gradpress.memory.watch(contender.model, *watched) as watch:
        contender.step(next(windows))
    largest = watch.largest_floating
    shape = "-" if largest is None else " x ".join(map(str, largest.shape))
    return _Memory(watch.peak, shape, first)


def _bound(passes: _Contender, setting: _Setting, limits: Limits) -> float:
    """Seconds of the products that no way does without, at the rate of `torch.mm`.

    They are those of the forward pass and of the gradients of activations. Gradients of weights are
    not: projected ones need fewer.
    """
    model: Any = passes.model
    windows = next(_windows(setting))
    embedded = model.get_input_embeddings()(windows[:, :-1]).detach().requires_grad_()
    with _frozen(model), FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops() / limits.flops)


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


def _ours(size: str, least: bool, again: bool) -> _Contender:
    model = gradpress.nn.quantize_(_model(size), target_modules=["attn", "mlp"])
    groups = gradpress.optim.param_groups(model, SIZES[size].rank, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(
        groups, lr=LR, stagger=False, materialize_gradients=not least
    )
    if again:
        gradpress.nn.checkpoint_blocks_(model)
    return _Contender(model, optimizer, least)


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
    return _Contender(model, optimizer)


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
    return _Contender(model, module.QGaLoreAdamW8bit(groups, lr=LR))


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
    _LEAST: lambda size, _: _ours(size, least=True, again=True),
    "gradpress, least memory, activations kept": lambda size, _: _ours(size, True, again=False),
    "gradpress, ordinary": lambda size, _: _ours(size, least=False, again=False),
    "galore-torch GaLoreAdamW": _galore,
    _Q_GALORE: _q_galore,
    _PASSES: lambda size, _: _Contender(_model(size), None),
}


def _table(setting: _Setting, memory: dict[str, _Memory], samples: Samples, bound: float) -> Table:
    head = ("way", "peak, MB", "x", "step, s", "x", "beyond, s", "first step, s", "largest tensor")
    beyond = {name: _beyond(samples, name) for name in memory}
    rows = [
        (
            name,
            number(found.peak / 1e6, 4),
            number(found.peak / memory[_LEAST].peak),
            number(samples.median(name)),
            number(samples.ratio(name, _LEAST)),
            number(beyond[name]) if name != _PASSES else "-",
            number(found.first),
            found.largest,
        )
        for name, found in memory.items()
    ]
    return Table(_title(setting), head, rows, _notes(samples, bound))


def _title(setting: _Setting) -> str:
    title = f"LLaMA of {setting.size}, rank {SIZES[setting.size].rank}"
    return f"{title}, {setting.batch} x {setting.length} tokens"


def _notes(samples: Samples, bound: float) -> list[str]:
    notes = [
        "The products that no way does without, forward and for the gradients of activations, take"
        f" {number(bound)} s at the rate of `torch.mm`."
    ]
    if _Q_GALORE in samples.seconds:
        whole = samples.median(_Q_GALORE)
        notes.append(
            f"q-galore-torch's step takes {number(whole / bound)} times as long: no way of stepping"
            " is faster than it by more."
        )
    return notes


def _beyond(samples: Samples, name: str) -> float:
    pairs = zip(samples.seconds[name], samples.seconds[_PASSES], strict=True)
    return statistics.median(whole - passes for whole, passes in pairs)
