"""LLaMA-7B trained whole on one card, in one call of less than nine minutes.

    python benches/gpu_7b.py [--wheel FOLDER] [--out FOLDER] [--device cuda] [--quick]

20 steps of 7B with every parameter trained, 16 x 256 tokens: the allocator's peak and tokens per
second, beside bitsandbytes' 8-bit AdamW on bfloat16 weights at the largest batch that fits; then
200 steps of 1B beside AdamW in bfloat16, with both loss curves. Text is the Python standard
library's sources, byte by byte. Needs PyTorch and gradpress; bitsandbytes where it is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LENGTH, BATCH = 256, 16
#: Seconds after which no further part begins.
BUDGET = 480.0


class Block(nn.Module):
    """A transformer block of LLaMA."""

    def __init__(self, hidden: int, intermediate: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.before, self.between = (nn.RMSNorm(hidden, eps=1e-6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and MLP, each added to what came in; ``[batch, length, hidden]``."""
        x = x + self._attention(self.before(x))
        y = self.between(x)
        result: torch.Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return result

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            getattr(self, name)(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        result: torch.Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, hidden))
        return result


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embeddings (Su et al. 2021, arXiv 2104.09864)."""
    length, width = x.shape[-2:]
    rates = 10_000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.outer(torch.arange(length, device=x.device), rates)
    cos, sin = (t.repeat(1, 2).to(x.dtype) for t in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Llama(nn.Module):
    """A LLaMA of one of the library's sizes."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocab_size, size.hidden_size)
        block = (size.hidden_size, size.intermediate_size, size.heads)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(size.hidden_size, size.vocab_size, bias=False)

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """The mean loss; no logits of a whole batch exist."""
        import gradpress

        x = self.embedding(windows[:, :-1])
        for block in self.blocks:
            x = block(x)
        hidden = self.norm(x).flatten(0, 1)
        return gradpress.nn.chunked_cross_entropy(
            hidden, self.lm_head.weight, windows[:, 1:].flatten()
        )


def build(size: Any, device: torch.device, bits: int | None) -> Llama:
    """A bfloat16 model with random weights; those of blocks are quantized one by one."""
    from gradpress.nn import QuantizedWeight

    with torch.device("meta"):
        model = Llama(size)
    generator = torch.Generator(device).manual_seed(0)
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            values = torch.ones(p.shape, dtype=torch.bfloat16, device=device)
            if p.dim() == 2:
                values.normal_(std=0.02, generator=generator)
            if bits is not None and "blocks" in path and p.dim() == 2:
                values = QuantizedWeight.from_float(values, bits=bits)
            setattr(module, name, nn.Parameter(values))
            del values
    return model


def text(device: torch.device, vocabulary: int) -> torch.Tensor:
    """Bytes of the standard library's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device).long() % vocabulary


def windows(data: torch.Tensor, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Batches of random places, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(data) - length - 1, (batch, 1), generator=generator)
        yield data[(starts + offsets).to(data.device)]


def least(model: Llama, rank: int, lr: float) -> torch.optim.Optimizer:
    """Q-GaLore with 4-bit moments; no gradient of a block's weight is formed."""
    import gradpress

    groups = gradpress.optim.param_groups(model, rank, verbose=False)
    optimizer = gradpress.optim.QGaLoreAdamW(
        groups, lr=lr, state_bits=4, materialize_gradients=False
    )
    gradpress.nn.checkpoint_blocks_(model)
    gradpress.optim.fused_backward(model, optimizer)
    return optimizer


def ordinary(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Another optimizer, with activations computed again as well."""

    def prepared(model: Llama, _rank: int, lr: float) -> torch.optim.Optimizer:
        import gradpress

        gradpress.nn.checkpoint_blocks_(model)
        return make(model.parameters(), lr=lr)

    return prepared


def train(
    size: Any, device: torch.device, prepare: Callable[..., Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Trains from the start.

    Returns:
        `batch`, `losses`, `tokens_per_second` (first steps left out), `peak_bytes`.
    """
    model = build(size, device, options["bits"])
    optimizer = prepare(model, size.rank, options["lr"])
    batch, length, steps = options["batch"], options["length"], options["steps"]
    batches = windows(text(device, size.vocab_size), batch, length)
    losses, warm, start = [], min(3, steps - 1), 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        if step == warm:
            _wait(device)
            start = time.perf_counter()
        loss = model.loss(next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    _wait(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "batch": batch,
        "losses": [round(float(loss), 4) for loss in losses],
        "tokens_per_second": (steps - warm) * batch * length / seconds,
        "peak_bytes": peak,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def largest_batch(run: Callable[[int], dict[str, Any]], batch: int) -> dict[str, Any]:
    """The run at this batch, or at half of it until it fits."""
    while True:
        try:
            return run(batch)
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def parts(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The parts by name, in their order."""
    from gradpress.train.sizes import SIZES

    large, middle = (SIZES["tiny"],) * 2 if quick else (SIZES["7B"], SIZES["1B"])
    length, steps, many = (16, 4, 6) if quick else (LENGTH, 20, 200)

    def once(size: Any, prepare: Any, **options: Any) -> Callable[[], dict[str, Any]]:
        def run(batch: int) -> dict[str, Any]:
            return train(size, device, prepare, {"length": length, "batch": batch, **options})

        return lambda: largest_batch(run, 2 if quick else BATCH)

    yield "7B, gradpress, INT8 weights", once(large, least, bits=8, lr=4e-3, steps=steps)
    try:
        import bitsandbytes
    except ImportError:
        print("left out: bitsandbytes, which is not installed", flush=True)
    else:
        theirs = ordinary(bitsandbytes.optim.AdamW8bit)
        yield "7B, bitsandbytes AdamW8bit", once(large, theirs, bits=None, lr=1e-4, steps=steps)
    yield "1B, gradpress, INT8 weights", once(middle, least, bits=8, lr=1e-2, steps=many)
    adamw = ordinary(torch.optim.AdamW)
    yield "1B, torch AdamW in bfloat16", once(middle, adamw, bits=None, lr=5e-4, steps=many)


def main(arguments: list[str]) -> int:
    """Runs the parts that there is time for, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="folder that holds an unpacked gradpress")
    parser.add_argument("--out", type=Path, help="folder for gpu_7b.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args(arguments)
    if options.wheel is not None:
        sys.path.insert(0, str(options.wheel))
    device = torch.device(options.device)
    begin, found = time.monotonic(), {}
    for name, run in parts(device, options.quick):
        if time.monotonic() - begin > BUDGET:
            print(f"left out, for want of time: {name}", flush=True)
            continue
        found[name] = result = run()
        print(line(name, result), flush=True)
        if options.out is not None:
            (options.out / "gpu_7b.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    losses = [loss for result in found.values() for loss in result["losses"]]
    return 0 if losses and all(map(math.isfinite, losses)) else 1


def line(name: str, result: dict[str, Any]) -> str:
    """One row of the table."""
    peak = result["peak_bytes"]
    target = " (target 11.50)" if name.startswith("7B, gradpress") else ""
    losses = result["losses"]
    return (
        f"{name:<30} batch {result['batch']:>2}  peak {peak / 2**30:6.2f} GiB{target}"
        f"  {result['tokens_per_second']:9.0f} tokens/s  loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
