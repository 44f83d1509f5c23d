"""optim.cu and direction.cu give the bits of the CPU."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import launch
from tests.kernels.inputs import SIZES, normal
from tests.kernels.launch import (
    DTYPES,
    ORDERS,
    PAIRS,
    Guarded,
    Shape,
    address,
    ceil,
    counter,
    same_bits,
)

from gradpress.ops import dynamic, optim

SEED = 0x0123456789ABCDEF
BLOCK_SIZES = {8: (32, 64, 128, 256, 512, 768, 2048, 1, 7, 33, 96, 5461), 4: (32, 128, 256, 2, 34)}
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def gradients(numel, seed):
    """From ordinary to zero, huge, infinite and NaN."""
    g = normal(numel, seed)
    g[::40], g[3::50], g[5::60] = float("nan"), float("inf"), -float("inf")
    g[7::30], g[9::70] = 0.0, 3e38
    return g


def numbers(step, decay):
    """What the host computes of a step."""
    return launch.AdamNumbers(
        step,
        HYPER["lr"] / (1 - HYPER["beta1"] ** step),
        1 / (1 - HYPER["beta2"] ** step) ** 0.5,
        1 - HYPER["lr"] * decay,
    )


class Case:
    """Tensors of one call. Without `bits` the moments are float32; without `param` a direction."""

    def __init__(self, numels, grad="f32", param=None, bits=None, size=256, steps=3):
        self.numels, self.param, self.grad, self.bits, self.size = numels, param, grad, bits, size
        # Not contiguous storage of one another: each may lie at an address of its own.
        self.params = [normal(n, 10 + i).to(DTYPES[param or "f32"]) for i, n in enumerate(numels)]
        self.grads = [gradients(n, 30 + i).to(DTYPES[grad]) for i, n in enumerate(numels)]
        m = [normal(n, 50 + i, 0.1) for i, n in enumerate(numels)]
        v = [normal(n, 70 + i, 0.1).square() for i, n in enumerate(numels)]
        if bits is None:
            self.states = [m, v]
        else:
            encode = [
                [dynamic.quantize_dynamic(x, signed=s, bits=bits, block_size=size) for x in xs]
                for xs, s in ((m, True), (v, False))
            ]
            self.states = [[e[i] for e in es] for es in encode for i in (0, 1)]
        self.steps = [steps + i for i in range(len(numels))]
        self.ids = [5 * i + 2 for i in range(len(numels))]

    def copies(self, guard, offset=0):
        params = [guard.copy(p, offset) for p in self.params]
        grads = [guard.copy(g, offset) for g in self.grads]
        return params, grads, [[guard.copy(s) for s in states] for states in self.states]

    def result(self, params, grads, states, count):
        target = grads if self.param is None else params
        return [("target", target), *((f"state {i}", s) for i, s in enumerate(states))], int(count)

    def on_cpu(self, decay=0.1, stochastic=True, maximize=False, grad_scale=1.0, rate=False):
        params, grads, states = self.copies(Guarded())
        count = counter()
        keywords = {**HYPER, "steps": self.steps, "nonfinite": count, "maximize": maximize}
        keywords["grad_scale"] = grad_scale
        if rate:
            keywords["lr"] = torch.tensor(HYPER["lr"])
        if self.bits is not None:
            keywords |= {"bits": self.bits, "block_size": self.size}
        kind = "adamw" if self.bits is None else "adamw_blockwise"
        if self.param is None:
            getattr(optim, f"{kind}_direction")(grads, *states, **keywords)
        else:
            keywords |= {"tensor_ids": self.ids, "weight_decay": decay, "seed": SEED}
            keywords["stochastic_rounding"] = stochastic
            getattr(optim, f"{kind}_step")(params, grads, *states, **keywords)
        return self.result(params, grads, states, count)

    def by_kernel(
        self,
        order,
        decay=0.1,
        stochastic=True,
        maximize=False,
        grad_scale=None,
        found_inf=None,
        any_size=None,
        offset=0,
        counted=False,
        rate=False,
    ):
        guard, count = Guarded(), counter()
        params, grads, states = self.copies(guard, offset)
        arguments, blocks = launch.AdamList(), 0
        shape = Shape(256, 8) if self.bits is None else Shape(self.size, self.bits, any_size)
        counters = torch.tensor(self.steps, dtype=torch.float32)
        lr = torch.tensor([HYPER["lr"]])
        m, m_scale, v, v_scale = states if self.bits else [states[0], None, states[1], None]
        for i, numel in enumerate(self.numels):
            entry = arguments.tensors[i]
            entry.param = address(params[i]) if self.param else None
            entry.grad = address(grads[i])
            entry.exp_avg, entry.exp_avg_sq = address(m[i]), address(v[i])
            if self.bits:
                entry.exp_avg_scale, entry.exp_avg_sq_scale = (
                    address(m_scale[i]),
                    address(v_scale[i]),
                )
            entry.numel, entry.first_block = numel, blocks
            entry.tensor_id = self.ids[i]
            if counted:
                entry.counter = address(counters[i])
            elif rate:
                entry.numbers.step = self.steps[i]
            else:
                entry.numbers = numbers(self.steps[i], decay)
            blocks += shape.blocks(numel)
        shared = launch.AdamShared(
            HYPER["beta1"],
            HYPER["beta2"],
            1 - HYPER["beta1"],
            1 - HYPER["beta2"],
            HYPER["eps"],
            -1.0 if maximize else 1.0,
            (ctypes.c_uint32 * 2)(*launch.key_words(SEED, 1)),
            int(stochastic),
        )
        if counted or rate:
            numbers_of_device = (HYPER["lr"], HYPER["beta1"], HYPER["beta2"], decay)
            shared.rates = launch.AdamRates(*numbers_of_device, None, int(counted))
        if rate:
            # What is not to be read where the device has it.
            shared.rates.lr, shared.rates.lr_at = float("nan"), address(lr)
        kind = "adamw" if self.bits is None else "adamw_blockwise"
        extra = [] if self.bits is None else [self.size, self.bits, *shape.extra]
        if self.param is None:
            module, name = launch.module("direction.cu"), f"{kind}_direction{shape.suffix}"
        else:
            module = launch.module("optim.cu", PARAM=self.param, GRAD=self.grad)
            name = f"{kind}_step{shape.suffix}"
        module.launch(
            name,
            blocks,
            shape.block,
            [arguments, len(self.numels), shared, grad_scale, found_inf, count, *extra],
            **order,
        )
        guard.check()
        return self.result(params, grads, states, count)

    def check(self, order, any_size=None, offset=0, grad_scale=None, **options):
        scale = None if grad_scale is None else torch.tensor([grad_scale])
        got, got_count = self.by_kernel(
            order, any_size=any_size, offset=offset, grad_scale=scale, **options
        )
        options.pop("counted", None)
        want, count = self.on_cpu(grad_scale=1.0 if scale is None else scale.item(), **options)
        about = (self.param, self.grad, self.bits, self.size, order)
        for (what, a), (_, b) in zip(got, want, strict=True):
            for i in range(len(a)):
                assert same_bits(a[i], b[i]), (what, i, self.numels[i], *about)
        assert got_count == count > 0


@pytest.mark.parametrize(("param", "grad"), PAIRS)
def test_step_with_float_moments(param, grad):
    for order, stochastic in itertools.product(ORDERS, (False, True)):
        Case([*SIZES, 0, 5], grad, param).check(order, stochastic=stochastic)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("param", "grad"), PAIRS)
def test_step_with_codes(param, grad, bits):
    orders = itertools.cycle(ORDERS)
    for size, stochastic in itertools.product(BLOCK_SIZES[bits], (False, True)):
        case = Case([*SIZES, 0, 5], grad, param, bits, size)
        case.check(next(orders), stochastic=stochastic)


def test_direction_with_float_moments():
    for order in ORDERS:
        Case([0, *SIZES]).check(order)


@pytest.mark.parametrize("bits", [4, 8])
def test_direction_with_codes(bits):
    orders = itertools.cycle(ORDERS)
    for size in BLOCK_SIZES[bits]:
        Case([0, *SIZES], bits=bits, size=size).check(next(orders))


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
@pytest.mark.parametrize("size", [64, 1024, 34, 700])
def test_codes_in_every_order(size, order):
    for bits, param in itertools.product((4, 8), ("bf16", None)):
        Case([4097, 3], param or "f32", param, bits, size).check(order)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("param", ["f32", "bf16", None])
def test_options(param, bits):
    case = Case([700, 31], param or "f32", param, bits, 64)
    for order, scale in zip(ORDERS, (1024.0, 3.0, 1e-3), strict=True):
        case.check(order, grad_scale=scale, maximize=True)
    case.check(ORDERS[0], offset=1, decay=0.0)
    if bits:
        case.check(ORDERS[1], any_size=True)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("param", ["f32", "bf16", None])
@pytest.mark.parametrize(("counted", "rate"), [(True, False), (False, True), (True, True)])
def test_numbers_of_the_device(param, bits, counted, rate):
    """The host gives where counters and learning rate are; the step's numbers have its bits."""
    orders = itertools.cycle(ORDERS)
    for steps, size in itertools.product((1, 2, 1000, 100_000), (64, 34) if bits else (64,)):
        case = Case([700, 0, 31, 2100], param or "f32", param, bits, size, steps)
        case.check(next(orders), counted=counted, rate=rate)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("param", ["bf16", None])
def test_found_inf_leaves_everything_untouched(param, bits):
    for size in (64, 7) if bits else (64,):
        case = Case([700, 31], param or "f32", param, bits, size)
        before, _ = case.result(*case.copies(Guarded()), counter())
        for flag in (0.0, 1.0):
            after, count = case.by_kernel(ORDERS[0], found_inf=torch.tensor([flag]))
            pairs = zip(before, after, strict=True)
            same = [same_bits(a, b) for (_, x), (_, y) in pairs for a, b in zip(x, y, strict=True)]
            assert all(same) == (flag == 1.0)
            assert (count == 0) == (flag == 1.0)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("param", ["bf16", None])
def test_a_scale_of_zero_counts_every_element_once(param, bits):
    for size in (64, 7) if bits else (64,):
        case = Case([701, 31], param or "f32", param, bits, size)
        _, count = case.by_kernel(ORDERS[0], grad_scale=torch.zeros(1))
        assert count == 732


@given(
    numels=st.lists(st.integers(0, 1500), min_size=1, max_size=launch.CAPACITY),
    param=st.sampled_from(("f32", "bf16")),
    bits=st.sampled_from((4, 8)),
    size=st.one_of(st.integers(1, 650), st.sampled_from((32, 64, 128, 256, 512, 1536))),
    stochastic=st.booleans(),
    steps=st.integers(1, 100_000),
)
@settings(max_examples=20)
def test_anything(numels, param, bits, size, stochastic, steps):
    size += bits == 4 and size % 2
    numels = [41, *numels][: launch.CAPACITY]
    case = Case(numels, param, param, bits, size, steps)
    case.check(ORDERS[steps % 3], stochastic=stochastic)


def philox(counter, key):
    """Philox4x32-10 of rows of four words, in 64 bits."""
    c, k, low = counter.astype(np.uint64), [np.uint64(word) for word in key], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[:, 0] * np.uint64(0xD2511F53), c[:, 2] * np.uint64(0xCD9E8D57)
        high = [p >> np.uint64(32) for p in (p0, p1)]
        c = np.stack([high[1] ^ c[:, 1] ^ k[0], p1 & low, high[0] ^ c[:, 3] ^ k[1], p0 & low], 1)
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


@pytest.mark.parametrize("size", [256, 500])
def test_elements_beyond_32_bits(size):
    """Blocks far behind the beginning of a tensor whose other parts do not exist."""
    shape, count, blocks = Shape(size, 8), 1000, 1 << 31
    first = blocks * shape.per_block
    param, grad = normal(count, 1).bfloat16(), torch.ones(count)
    codes = torch.full((2, count), 200, dtype=torch.uint8)
    scales = torch.ones(2, ceil(count, size))
    arguments, seen = launch.AdamList(), counter()
    entry = arguments.tensors[0]
    entry.param, entry.grad = address(param) - 2 * first, address(grad) - 4 * first
    entry.exp_avg, entry.exp_avg_sq = address(codes[0]) - first, address(codes[1]) - first
    entry.exp_avg_scale = address(scales[0]) - 4 * (first // size)
    entry.exp_avg_sq_scale = address(scales[1]) - 4 * (first // size)
    # The subtraction of the first block wraps, so that the launch begins at block 2^31.
    entry.numel, entry.first_block = first + count, (1 << 32) - blocks
    entry.tensor_id, entry.numbers = 6, launch.AdamNumbers(9, 0.0, 1.0, 0.999)
    key = launch.key_words(SEED, 1)
    shared = launch.AdamShared(
        0.9, 0.99, 1 - 0.9, 1 - 0.99, 1e-8, 1.0, (ctypes.c_uint32 * 2)(*key), 1
    )
    before = param.float().numpy()
    launch.module("optim.cu", PARAM="bf16", GRAD="f32").launch(
        "adamw_blockwise_step" + shape.suffix,
        shape.blocks(count),
        shape.block,
        [arguments, 1, shared, None, None, seen, size, 8, *shape.extra],
    )
    element = first + np.arange(count)
    lane, half = element // 256 * 32 + element % 32, element % 256 // 32
    assert (lane >> 32).min() > 0
    rows = np.stack([lane & 0xFFFFFFFF, lane >> 32, 0 * lane + 6, 0 * lane + 9], 1)
    words = philox(rows, key)[np.arange(count), half // 2]
    dithers = words >> (16 * (half % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    bits = (before * np.float32(0.999)).view(np.uint32).astype(np.uint64)
    want = ((bits + dithers) >> np.uint64(16)).astype(np.uint16)
    assert np.array_equal(param.view(torch.uint16).numpy(), want)
