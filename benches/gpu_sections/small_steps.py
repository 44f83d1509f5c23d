"""Small optimizer steps and ops on a device, beside the CPU's.

`python -m benches.gpu_sections.small_steps` runs a few of them, for compute-sanitizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import gradpress
from gradpress.ops import dynamic, lowrank, quant

Answer = tuple[str, bool]

STEPS = 4
#: How far a Q-GaLore step may go another way than the CPU's, as a share of what it moves: products
#: differ in their last bits, which decides some roundings and the signs of Adam's first steps.
APART = 0.05
DTYPES = (torch.float32, torch.bfloat16)


def answers(device: torch.device) -> Iterator[Answer]:
    """What was compared, and whether it agreed."""
    for dtype in DTYPES:
        for bits in (8, 4, 32):
            yield adamw(device, dtype, bits)
        for projector_bits in (4, None):
            for weight_bits in (None, 8, 4):
                yield qgalore(device, dtype, projector_bits, weight_bits)


def few(device: torch.device) -> Iterator[Answer]:
    """A few of them, and all kernels that no optimizer calls."""
    yield from ops(device)
    yield adamw(device, torch.float32, 8, steps=2)
    yield adamw(device, torch.bfloat16, 4, steps=2)
    yield adamw(device, torch.float32, 32, steps=1)
    yield qgalore(device, torch.bfloat16, 4, 8, steps=3)
    yield qgalore(device, torch.float32, None, None, steps=1)
    yield qgalore(device, torch.float32, 4, 4, steps=1, group_size=100)


def ops(device: torch.device) -> Iterator[Answer]:
    """Single ops, bit for bit, and a decomposition."""
    x = torch.randn(5001, generator=torch.Generator().manual_seed(0))
    codes = (x * 5).to(torch.int64).remainder(16).to(torch.uint8)
    for size in (256, 100):
        for bits in (8, 4):
            grid = partial(_round_trip, bits=bits, size=size)
            yield f"quantize, {bits} bits, groups of {size}", _same(grid, device, x)
            mapped = partial(_mapped, bits=bits, size=size)
            yield f"dynamic map, {bits} bits, blocks of {size}", _same(mapped, device, x)
            changed = partial(_requantized, bits=bits, size=size)
            yield f"dense update, {bits} bits, groups of {size}", _same(changed, device, x)
    yield "pack and unpack", _same(_packed, device, codes)
    yield "round_bf16_stochastic", _same(quant.round_bf16_stochastic, device, x)
    matrix = x[: 60 * 40].view(60, 40)
    u, s, vh = gradpress.lowrank.svd(matrix.to(device), 40)
    back = ((u * s) @ vh).cpu()
    yield "svd", bool(torch.linalg.norm(back - matrix) <= 1e-4 * torch.linalg.norm(matrix))


def _round_trip(x: torch.Tensor, bits: int, size: int) -> list[Any]:
    q = gradpress.quant.quantize(x, bits=bits, group_size=size, seed=3)
    return [q.codes, q.scale, q.dequantize()]


def _mapped(x: torch.Tensor, bits: int, size: int) -> list[Any]:
    codes, scale, _ = dynamic.quantize_dynamic(x, bits=bits, block_size=size)
    return [codes, scale, dynamic.dequantize_dynamic(codes, scale, bits=bits, block_size=size)]


def _requantized(x: torch.Tensor, bits: int, size: int) -> list[Any]:
    """Weights that a dense update changes in place."""
    shape = (1, x.numel())
    layout: Any = {"bits": bits, "group_size": size}
    parts: Any = quant.quantize_blockwise(x, **layout)
    codes, scale, zero_point, _ = parts
    codes = codes if bits == 4 else codes.view(shape)
    numbers: Any = {"scale": 0.1, "seed": 5, "tensor_ids": [2], "steps": [3]}
    update = [x.flip(0).view(shape)]
    lowrank.project_back_requantize(
        [codes], [scale], [zero_point], [shape], update, [], **layout, **numbers
    )
    return [codes, scale, zero_point]


def _packed(codes: torch.Tensor) -> list[Any]:
    packed = quant.pack_int4(codes)
    return [packed, quant.unpack_int4(packed, codes.numel())]


def _same(op: Callable[[torch.Tensor], Any], device: torch.device, x: torch.Tensor) -> bool:
    ours, cpu = op(x.to(device)), op(x)
    if isinstance(ours, torch.Tensor):
        ours, cpu = [ours], [cpu]
    return all(torch.equal(a.cpu(), b) for a, b in zip(ours, cpu, strict=True))


def model(dtype: torch.dtype) -> nn.Sequential:
    """Three matrices and a norm, the same every time."""
    torch.manual_seed(0)
    layers = [nn.Linear(96, 160), nn.Linear(160, 64), nn.Linear(64, 64)]
    return nn.Sequential(*layers, nn.LayerNorm(64)).to(dtype)


def _train(net: nn.Module, make: Callable[[Any], torch.optim.Optimizer], steps: int) -> list[Any]:
    """The parameters after steps on gradients that do not depend on them."""
    optimizer = make(net.parameters())
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            grad = torch.randn(p.shape, generator=generator)
            grad *= (1 + torch.arange(p.shape[-1])) ** -0.5
            p.grad = grad.to(p.device, p.dtype)
        optimizer.step()
    return [_dense(p).float().cpu() for p in net.parameters()]


def _dense(p: torch.Tensor) -> torch.Tensor:
    return p.dequantize() if isinstance(p, gradpress.nn.QuantizedWeight) else p.detach()


def adamw(device: torch.device, dtype: torch.dtype, bits: int, steps: int = STEPS) -> Answer:
    """`AdamW8bit`, bit for bit."""

    def make(params: Any) -> torch.optim.Optimizer:
        return gradpress.optim.AdamW8bit(params, lr=1e-2, state_bits=bits, min_8bit_size=100)

    cpu, other = (_train(model(dtype).to(d), make, steps) for d in ("cpu", device))
    what = f"AdamW8bit, {dtype}, moments of {bits} bits: {steps} steps are the CPU's"
    return what, all(torch.equal(*pair) for pair in zip(other, cpu, strict=True))


def qgalore(
    device: torch.device,
    dtype: torch.dtype,
    projector_bits: int | None,
    weight_bits: int | None,
    steps: int = STEPS,
    group_size: int = 32,
) -> Answer:
    """`QGaLoreAdamW`, as near as products in another order allow."""

    def make(params: Any) -> torch.optim.Optimizer:
        return gradpress.optim.QGaLoreAdamW(
            params, lr=1e-2, rank=8, update_proj_gap=2, projector_bits=projector_bits
        )

    results = []
    for where in ("cpu", device):
        net = model(dtype)
        if weight_bits is not None:
            gradpress.nn.quantize_(net, bits=weight_bits, group_size=group_size)
        results.append(_train(net.to(where), make, steps))
    start = [p.detach().float() for p in model(dtype).parameters()]
    near = True
    for before, cpu, other in zip(start, *results, strict=True):
        moved = float((cpu - before).norm())
        near = near and moved > 0 and float((other - cpu).norm()) <= APART * moved
    what = f"QGaLoreAdamW, {dtype}, projectors {projector_bits}, weights {weight_bits}"
    return f"{what}: {steps} steps go the CPU's way", near


def main() -> int:
    """Runs the few; says what disagreed."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    wrong = [what for what, right in few(device) if not right]
    print("\n".join(f"wrong: {what}" for what in wrong) or "all agree with the CPU", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
