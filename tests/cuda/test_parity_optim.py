"""The ops of the family optim on CUDA: every bit as on the CPU."""

import itertools

import pytest
import torch

from gradpress.ops import dynamic, optim

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUICK = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
PAIRS = [
    pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow], id=str(pair))
    for pair in itertools.product(DTYPES, DTYPES)
]
#: More than the emulator's lists hold, so that a call takes several launches.
SHAPES = [(30, 70), (7,), (0,), (2049,), (256,), (16, 16, 9), (1,), (5000,)]
LAYOUTS = [(8, 256), (4, 128), (8, 2048), (8, 768), (8, 100), (4, 34), (8, 1 << 40)]


def randn(shape, seed, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * scale).to(dtype)


def gradients(dtype, poisoned=True):
    grads = [randn(shape, i, dtype, 10.0 ** (i - 4)) for i, shape in enumerate(SHAPES)]
    if poisoned:
        grads[3][5:8] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
        grads[7][4000] = torch.finfo(dtype).max
    return grads


def moments():
    m = [randn(shape, 50 + i, scale=0.1) for i, shape in enumerate(SHAPES)]
    v = [randn(shape, 90 + i, scale=0.1).square() for i, shape in enumerate(SHAPES)]
    return m, v


def codes(bits, size):
    lists = ([], [], [], [])
    for signed, tensors in zip((True, False), moments(), strict=True):
        for x in tensors:
            code, scale, _ = dynamic.quantize_dynamic(x, signed=signed, bits=bits, block_size=size)
            lists[2 * (not signed)].append(code)
            lists[2 * (not signed) + 1].append(scale)
    return lists


def counter():
    return torch.full((1,), 40, dtype=torch.int64)


def common():
    count = len(SHAPES)
    return {**HYPER, "steps": [1 + i * i for i in range(count)], "nonfinite": counter()}


def full():
    ids = {"tensor_ids": [(7 * i) % 13 for i in range(len(SHAPES))]}
    return {**common(), **ids, "weight_decay": 0.1, "seed": 1 << 40}


#: Of a step that a graph records: several tensors at several points of their training.
STEPS = [1.0, 2.0, 1000.0, 100_000.0, 16_777_216.0, 1.0, 65_535.0, 3.0]


def counted(options, rate=True, steps=STEPS):
    """The same, with steps and learning rate in tensors."""
    counters = [torch.full([1] * (i % 2), step) for i, step in enumerate(steps)]
    rates = {"lr": torch.tensor(3e-3)} if rate else {}
    return {**options, "steps": counters, **rates}


#: What a gradient scaler hands over, and numbers.
SCALES = [
    {"grad_scale": 8.0, "maximize": True},
    {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
    {"grad_scale": torch.tensor([65536.0]), "found_inf": torch.tensor([2.0])},
]


@pytest.mark.parametrize(("param", "grad"), PAIRS)
def test_adamw_step(parity, param, grad):
    params, grads = [randn(shape, 7 + i, param) for i, shape in enumerate(SHAPES)], gradients(grad)
    for options in ({}, {"stochastic_rounding": False}, *SCALES):
        parity(optim.adamw_step, params, grads, *moments(), **full(), **options)


@pytest.mark.parametrize(("param", "grad"), PAIRS)
def test_adamw_blockwise_step(parity, param, grad):
    params, grads = [randn(shape, 7 + i, param) for i, shape in enumerate(SHAPES)], gradients(grad)
    for bits, size in LAYOUTS:
        layout = {"bits": bits, "block_size": size}
        parity(optim.adamw_blockwise_step, params, grads, *codes(bits, size), **full(), **layout)
    for options in ({"stochastic_rounding": False}, *SCALES):
        parity(optim.adamw_blockwise_step, params, grads, *codes(8, 256), **full(), **options)


def test_lists_of_several_dtypes(parity):
    pairs = [*QUICK, *QUICK, QUICK[0], *QUICK, QUICK[1]]
    params = [randn(s, i, p) for i, (s, (p, _)) in enumerate(zip(SHAPES, pairs, strict=True))]
    grads = [randn(s, 9 - i, g) for i, (s, (_, g)) in enumerate(zip(SHAPES, pairs, strict=True))]
    parity(optim.adamw_blockwise_step, params, grads, *codes(8, 256), **full())
    nothing = {**full(), "steps": [], "tensor_ids": []}
    parity(optim.adamw_step, [], [], [], [], **nothing)


def test_adamw_direction(parity):
    for options in ({}, *SCALES):
        parity(optim.adamw_direction, gradients(torch.float32), *moments(), **common(), **options)


def test_adamw_blockwise_direction(parity):
    grads = gradients(torch.float32)
    for bits, size in LAYOUTS:
        layout = {"bits": bits, "block_size": size}
        parity(optim.adamw_blockwise_direction, grads, *codes(bits, size), **common(), **layout)
    for options in SCALES:
        parity(optim.adamw_blockwise_direction, grads, *codes(8, 256), **common(), **options)


@pytest.mark.parametrize("friction", ["abs", "signed", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_with_friction(parity, friction, dtype):
    grads = gradients(torch.float32)
    before = [randn(shape, 30 + i, dtype, 10.0 ** (i - 4)) for i, shape in enumerate(SHAPES)]
    rubbed = {"previous_grads": before, "friction": friction}
    for options in ({}, *SCALES):
        parity(optim.adamw_direction, grads, *moments(), **common(), **rubbed, **options)
    for bits, size in LAYOUTS:
        layout = {"bits": bits, "block_size": size}
        states = codes(bits, size)
        parity(optim.adamw_blockwise_direction, grads, *states, **common(), **layout, **rubbed)


@pytest.mark.parametrize(("param", "grad"), PAIRS)
def test_steps_with_counters(parity, param, grad):
    params, grads = [randn(shape, 7 + i, param) for i, shape in enumerate(SHAPES)], gradients(grad)
    for options in ({}, *SCALES):
        parity(optim.adamw_step, params, grads, *moments(), **counted(full()), **options)
    for bits, size in LAYOUTS:
        layout = {**counted(full()), "bits": bits, "block_size": size}
        parity(optim.adamw_blockwise_step, params, grads, *codes(bits, size), **layout)
    for options in SCALES:
        parity(
            optim.adamw_blockwise_step, params, grads, *codes(8, 256), **counted(full()), **options
        )


def test_counters_or_rates_alone_and_counters_of_nothing(parity):
    params, grads = [randn(s, i) for i, s in enumerate(SHAPES)], gradients(torch.float32)
    strange = [0.0, -1.0, float("nan"), 0.5, float("inf"), 1e12, 2.5, 4294967296.0]
    for options in (
        counted(full(), rate=False),
        {**full(), "lr": torch.tensor([3e-3])},
        counted(full(), steps=strange),
    ):
        parity(optim.adamw_step, params, grads, *moments(), **options)
    assert torch.isfinite(torch.cat([p.flatten() for p in params])).all()


def test_directions_with_counters(parity):
    grads = gradients(torch.float32)
    for options in ({}, *SCALES):
        parity(optim.adamw_direction, grads, *moments(), **counted(common()), **options)
    for bits, size in LAYOUTS:
        layout = {**counted(common()), "bits": bits, "block_size": size}
        parity(optim.adamw_blockwise_direction, grads, *codes(bits, size), **layout)
    before = [randn(shape, 30 + i) for i, shape in enumerate(SHAPES)]
    rubbed = {"previous_grads": before, "friction": "abs"}
    parity(optim.adamw_direction, grads, *moments(), **counted(common()), **rubbed)
