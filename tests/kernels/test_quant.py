"""quant.cu gives the bits of the CPU."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import launch
from tests.kernels.inputs import GROUPS, SIZES, kinds, normal
from tests.kernels.launch import DTYPES, ORDERS, Guarded, Shape, ceil, counter, same_bits

from gradpress.ops import quant

SEED = 0xDEADBEEF12345678


def quantize(x, name, bits, size, symmetric, stochastic, order, any_size=None, ids=(3, 5)):
    """Codes, scales, zero points and the count, by the kernel."""
    out, shape = Guarded(), Shape(size, bits, any_size)
    groups = ceil(x.numel(), size)
    codes = out.empty((ceil(x.numel(), 8 // bits),), torch.uint8)
    scale = out.empty((groups,), torch.float32)
    zero_point = None if symmetric else out.empty((groups,), torch.uint8)
    count = counter()
    rounding = (bits, int(stochastic), launch.key(SEED, 0, *ids))
    launch.module("quant.cu", ELEM=name).launch(
        "quantize_blockwise" + shape.suffix,
        shape.blocks(x.numel()),
        shape.block,
        [x, codes, scale, zero_point, count, x.numel(), size, *rounding, *shape.extra],
        **order,
    )
    out.check()
    return codes, scale, zero_point, int(count)


def check(x, name, bits, size, symmetric, stochastic, order, any_size=None):
    got = quantize(x, name, bits, size, symmetric, stochastic, order, any_size)
    want = quant.quantize_blockwise(
        x,
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        rounding="stochastic" if stochastic else "nearest",
        seed=SEED,
        tensor_id=3,
        step=5,
    )
    about = (x.numel(), size, stochastic, order)
    assert same_bits(got[0], want.codes), about
    assert same_bits(got[1], want.scale), about
    assert symmetric or same_bits(got[2], want.zero_point), about
    assert got[3] == want.nonfinite, about


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_quantize_every_size(name, bits, symmetric):
    orders = itertools.cycle(ORDERS)
    for numel in SIZES:
        x = normal(numel, numel).to(DTYPES[name])
        for size, stochastic in itertools.product(GROUPS, (False, True)):
            check(x, name, bits, size, symmetric, stochastic, next(orders))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_quantize_hard_values(name, bits):
    orders = itertools.cycle(ORDERS)
    for x in kinds(name, 1500, 1).values():
        for size, symmetric in itertools.product((32, 128, 256, 768, 1, 7, 5461), (False, True)):
            check(x, name, bits, size, symmetric, size != 32, next(orders))


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
@pytest.mark.parametrize("size", [64, 1024, 33, 700])
def test_quantize_in_every_order(size, order):
    x = normal(4097, 2)
    x[::100] = float("nan")
    for bits, symmetric in itertools.product((4, 8), (False, True)):
        check(x, "f32", bits, size, symmetric, True, order)


@pytest.mark.parametrize("size", [32, 128, 256, 2048])
def test_both_kernels_agree_on_plain_sizes(size):
    x = normal(3000, 3).half()
    for bits in (4, 8):
        check(x, "f16", bits, size, False, True, ORDERS[0], any_size=True)


@pytest.mark.parametrize("name", DTYPES)
def test_unaligned_tensors(name):
    x = normal(1003, 4).to(DTYPES[name])[1:]
    for bits, size in itertools.product((4, 8), (64, 256, 9)):
        check(x, name, bits, size, False, True, ORDERS[2])


@given(
    numel=st.integers(1, 1200),
    size=st.one_of(st.integers(1, 1300), st.sampled_from(GROUPS)),
    bits=st.sampled_from((4, 8)),
    symmetric=st.booleans(),
    stochastic=st.booleans(),
    exponent=st.integers(-140, 126),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_quantize_anything(numel, size, bits, symmetric, stochastic, exponent, seed):
    x = normal(numel, seed) * 2.0 ** max(exponent, -126) * 2.0 ** min(exponent + 126, 0)
    check(x, "f32", bits, min(size, numel), symmetric, stochastic, ORDERS[seed % 3])


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("negative", [False, True])
def test_values_on_the_grid_stay(negative, any_size):
    """Enough of them, far enough from zero, that dithers come close to either end."""
    size = 256
    torch.manual_seed(2)
    codes = torch.randint(180, 256, (400_128,), dtype=torch.uint8)
    codes[::256], codes[1::256] = 0, 255
    scale, zero_point = torch.rand(1563) + 0.1, torch.randint(0, 9, (1563,), dtype=torch.uint8)
    if negative:
        codes, zero_point = 255 - codes, 255 - zero_point
    x = quant.dequantize_blockwise(codes, scale, zero_point, shape=codes.shape, group_size=size)
    check(x, "f32", 8, size, False, True, ORDERS[0], any_size)
    assert same_bits(quantize(x, "f32", 8, size, False, True, ORDERS[0], any_size)[0], codes)


def test_the_counter_is_increased_or_left_out():
    x = torch.full((300,), float("nan"))
    codes, scale = torch.empty(300, dtype=torch.uint8), torch.empty(300)
    count = counter() + 7
    for size, target in ((32, count), (33, count), (32, None), (33, None)):
        shape = Shape(size, 8)
        launch.module("quant.cu", ELEM="f32").launch(
            "quantize_blockwise" + shape.suffix,
            shape.blocks(300),
            shape.block,
            [x, codes, scale, None, target, 300, size, 8, 0, launch.key(0, 0, 0, 0), *shape.extra],
        )
    assert int(count) == 607


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DTYPES)
def test_dequantize(name, bits, symmetric):
    orders = itertools.cycle(ORDERS)
    sizes = (*GROUPS, 2560)
    for numel, size, offset in itertools.product((1, 31, 257, 4097), sizes, (0, 1)):
        torch.manual_seed(numel + size)
        codes = torch.randint(0, 256, (ceil(numel, 8 // bits) + offset,), dtype=torch.uint8)
        codes, groups = codes[offset:], ceil(numel, size)
        scale = torch.rand(groups) * 10.0 ** torch.randint(-30, 30, (groups,))
        zero_point = None if symmetric else torch.randint(0, 256, (groups,), dtype=torch.uint8)
        guard = Guarded()
        out = guard.empty((numel,), DTYPES[name], offset)
        plain = size in (32, 64, 128) or size % 256 == 0
        launch.module("quant.cu", ELEM=name).launch(
            "dequantize_blockwise" if plain else "dequantize_blockwise_any",
            ceil(numel, 2048 if plain else 512),
            256,
            [codes, scale, zero_point, out, numel, size, bits],
            **next(orders),
        )
        guard.check()
        want = quant.dequantize_blockwise(
            codes.view(torch.int8) if symmetric and bits == 8 else codes,
            scale,
            zero_point,
            shape=(numel,),
            dtype=str(DTYPES[name]).removeprefix("torch."),
            bits=bits,
            group_size=size,
        )
        assert same_bits(out, want), (numel, size)


@pytest.mark.parametrize("name", DTYPES)
def test_nan_and_overflow_survive_narrowing(name):
    codes = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([0x7FC01234, 0x7FFFFFFF, -1, 0x7F7FFFFF], dtype=torch.int32)
    scale = scale.view(torch.float32)  # NaNs of either sign, the largest number
    out = torch.empty(256, dtype=DTYPES[name])
    launch.module("quant.cu", ELEM=name).launch(
        "dequantize_blockwise", 1, 256, [codes, scale, None, out, 256, 64, 8]
    )
    want = quant.dequantize_blockwise(
        codes.view(torch.int8),
        scale,
        None,
        shape=(256,),
        dtype=str(out.dtype).removeprefix("torch."),
        group_size=64,
    )
    assert same_bits(out, want)


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
def test_pack_and_unpack(order):
    kernels = launch.module("quant.cu", ELEM="f32")
    for numel, offset in itertools.product((*SIZES, 15, 16, 17, 32), (0, 1)):
        codes = torch.randint(0, 256, (numel + offset,), dtype=torch.uint8)[offset:]
        guard = Guarded()
        packed = guard.empty((ceil(numel, 2),), torch.uint8, offset)
        unpacked = guard.empty((numel,), torch.uint8, offset)
        blocks = ceil(numel, 4096)
        kernels.launch("pack_int4", blocks, 256, [codes, packed, numel], **order)
        kernels.launch("unpack_int4", blocks, 256, [packed, unpacked, numel], **order)
        guard.check()
        assert same_bits(packed, quant.pack_int4(codes))
        assert same_bits(unpacked, quant.unpack_int4(packed, numel))


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
def test_round_bf16_stochastic(order):
    for numel in SIZES:
        x = torch.randint(-(2**31), 2**31, (numel,), dtype=torch.int32).view(torch.float32)
        x[::9] = torch.finfo(torch.float32).max
        guard = Guarded()
        out = guard.empty((numel,), torch.bfloat16)
        arguments = [x, out, numel, launch.key(SEED, 1, 2, 9)]
        launch.module("quant.cu", ELEM="f32").launch(
            "round_bf16_stochastic", ceil(numel, 2048), 256, arguments, **order
        )
        guard.check()
        want = quant.round_bf16_stochastic(x, seed=SEED, tensor_id=2, step=9)
        assert same_bits(out, want)
