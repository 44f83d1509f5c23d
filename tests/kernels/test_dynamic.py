"""dynamic.cu gives the bits of the CPU."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import launch, tables
from tests.kernels.inputs import GROUPS, SIZES, kinds, normal
from tests.kernels.launch import DTYPES, ORDERS, Guarded, Shape, ceil, counter, same_bits

from gradpress.ops import dynamic


def check(x, name, bits, size, signed, order, any_size=None):
    guard, shape, count = Guarded(), Shape(size, bits, any_size), counter()
    codes = guard.empty((ceil(x.numel(), 8 // bits),), torch.uint8)
    scale = guard.empty((ceil(x.numel(), size),), torch.float32)
    launch.module("dynamic.cu", ELEM=name).launch(
        "quantize_dynamic" + shape.suffix,
        shape.blocks(x.numel()),
        shape.block,
        [x, codes, scale, count, x.numel(), size, bits, int(signed), *shape.extra],
        **order,
    )
    guard.check()
    want = dynamic.quantize_dynamic(x, signed=signed, bits=bits, block_size=size)
    about = (x.numel(), size, signed, order)
    assert same_bits(codes, want[0]), about
    assert same_bits(scale, want[1]), about
    assert int(count) == want[2], about


def sizes(bits):
    return [size for size in GROUPS if bits == 8 or size % 2 == 0]


def test_tables_are_those_of_the_cpu():
    assert tables.HEADER.read_text() == tables.header()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_quantize_every_size(name, bits, signed):
    orders = itertools.cycle(ORDERS)
    for numel, size in itertools.product(SIZES, sizes(bits)):
        x = normal(numel, numel)
        x = x if signed else x.square()
        check(x.to(DTYPES[name]), name, bits, size, signed, next(orders))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_quantize_hard_values(name, bits):
    orders = itertools.cycle(ORDERS)
    for x in kinds(name, 1500, 1).values():
        for size, signed in itertools.product(sizes(bits), (False, True)):
            check(x, name, bits, size, signed, next(orders))


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
@pytest.mark.parametrize("size", [64, 1024, 34, 700])
def test_quantize_in_every_order(size, order):
    x = normal(4097, 2)
    x[::100] = float("inf")
    for bits, signed in itertools.product((4, 8), (False, True)):
        check(x, "f32", bits, size, signed, order)


@pytest.mark.parametrize("size", [32, 128, 256, 2048])
def test_both_kernels_agree_on_plain_sizes(size):
    for bits in (4, 8):
        check(normal(3000, 3).bfloat16(), "bf16", bits, size, True, ORDERS[0], any_size=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_every_border_between_codes(signed, bits):
    """The floats around each place where the code changes, in one block of scale 1."""
    values = np.sort(tables.values(signed, bits))
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    thresholds = np.array([float.fromhex("0x1p-31"), 0.0], np.float32)
    near = np.concatenate([values, middles, thresholds, -middles]).view(np.int32)
    near = (near[:, None] + np.arange(-6, 7)).astype(np.int32).view(np.float32).ravel()
    near = np.concatenate([[np.float32(1)], near[np.abs(near) <= 1]])
    if not signed:
        near = np.abs(near)
    x = torch.from_numpy(near)[: len(near) // 2 * 2]
    check(x, "f32", bits, x.numel(), signed, ORDERS[0])


@given(
    numel=st.integers(1, 1200),
    size=st.one_of(st.integers(1, 650), st.sampled_from(GROUPS)),
    bits=st.sampled_from((4, 8)),
    signed=st.booleans(),
    exponent=st.integers(-140, 126),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_quantize_anything(numel, size, bits, signed, exponent, seed):
    x = normal(numel, seed) * 2.0 ** max(exponent, -126) * 2.0 ** min(exponent + 126, 0)
    size += bits == 4 and size % 2
    check(x if signed else x.abs(), "f32", bits, size, signed, ORDERS[seed % 3])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize(bits, signed):
    orders = itertools.cycle(ORDERS)
    for numel, size in itertools.product((1, 31, 257, 4097), (*sizes(bits), 2560)):
        torch.manual_seed(numel + size)
        codes = torch.randint(0, 256, (ceil(numel, 8 // bits),), dtype=torch.uint8)
        scale = torch.rand(ceil(numel, size)) * 1e-5
        guard = Guarded()
        out = guard.empty((numel,), torch.float32)
        plain = size in (32, 64, 128) or size % 256 == 0
        launch.module("dynamic.cu", ELEM="f32").launch(
            "dequantize_dynamic" if plain else "dequantize_dynamic_any",
            ceil(numel, 2048 if plain else 512),
            256,
            [codes, scale, out, numel, size, bits, int(signed)],
            **next(orders),
        )
        guard.check()
        want = dynamic.dequantize_dynamic(
            codes, scale, signed=signed, bits=bits, block_size=size, shape=(numel,)
        )
        assert same_bits(out, want), (numel, size)
