"""The ops of the family quant on CUDA: every bit as on the CPU."""

import pytest
import torch

from gradpress.ops import dynamic, lowrank, quant

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
#: Elements and group size: plain sizes of all kinds, others, ragged, empty, and beyond the tensor.
LAYOUTS = [
    (5000, 256),
    (2049, 32),
    (4097, 2048),
    (3000, 768),
    (1001, 7),
    (999, 6),
    (3000, 1000),
    (70, 1 << 40),
    (1, 1),
    (0, 256),
]


def values(count, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g) * torch.rand(count, generator=g).mul(8).exp2()
    return x.to(dtype)


def poisoned(count, dtype=torch.float32):
    x = values(count, dtype)
    spots = [5, 77, 78, 300, 555]
    x[[i for i in spots if i < count]] = torch.tensor(float("nan"), dtype=dtype)
    x[600:605], x[700:701] = float("inf"), -float("inf")
    return x


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_blockwise(parity, bits, dtype, rounding):
    options = {"bits": bits, "rounding": rounding, "seed": 1 << 63, "tensor_id": 3, "step": 9}
    for count, size in LAYOUTS:
        for symmetric in (False, True):
            layout = {**options, "symmetric": symmetric, "group_size": size}
            parity(quant.quantize_blockwise, values(count, dtype), **layout)
    result = parity(quant.quantize_blockwise, poisoned(1001, dtype), **options, group_size=128)
    assert result.nonfinite == 11
    parity(quant.quantize_blockwise, poisoned(1001, dtype), **options, group_size=77)
    parity(quant.quantize_blockwise, values(1 + 5000, dtype)[1:], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantize_blockwise(parity, bits, dtype):
    for count, size in [*LAYOUTS, (5000, 2304)]:
        for symmetric in (False, True):
            layout = {"bits": bits, "group_size": size}
            parts = quant.quantize_blockwise(values(count), **layout, symmetric=symmetric)
            out = {"shape": (count,), "dtype": NAMES[dtype]}
            parity(quant.dequantize_blockwise, *parts[:3], **layout, **out)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 4096, 9001])
def test_pack_int4(parity, count):
    codes = (values(count) * 5).to(torch.int64).remainder(16).to(torch.uint8)
    packed = parity(quant.pack_int4, codes)
    assert torch.equal(quant.unpack_int4(packed, count), codes)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 4096, 9001])
def test_unpack_int4(parity, count):
    packed = (values((count + 1) // 2) * 50).to(torch.int64).remainder(256).to(torch.uint8)
    parity(quant.unpack_int4, packed, count)
    parity(quant.unpack_int4, torch.cat([packed, packed])[len(packed) :], count)


@pytest.mark.parametrize("count", [0, 1, 2048, 5001])
def test_round_bf16_stochastic(parity, count):
    for x in (values(count), poisoned(count), torch.full((count,), 3.4e38)):
        parity(quant.round_bf16_stochastic, x, seed=5, tensor_id=1, step=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_dynamic(parity, bits, dtype):
    for count, size in LAYOUTS:
        if bits == 4 and size % 2:
            continue
        for signed in (True, False):
            x = values(count, dtype) if signed else values(count, dtype).square()
            layout = {"signed": signed, "bits": bits, "block_size": size}
            parity(dynamic.quantize_dynamic, x, **layout)
    result = parity(dynamic.quantize_dynamic, poisoned(1001, dtype), bits=bits)
    assert result[2] == 11
    parity(dynamic.quantize_dynamic, poisoned(1001, dtype), bits=bits, block_size=78)


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantize_dynamic(parity, bits):
    for count, size in [*LAYOUTS, (5000, 2304)]:
        if bits == 4 and size % 2:
            continue
        for signed in (True, False):
            layout = {"signed": signed, "bits": bits, "block_size": size}
            codes, scale, _ = dynamic.quantize_dynamic(values(count), **layout)
            parity(dynamic.dequantize_dynamic, codes, scale, **layout, shape=(count,))


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [256, 64, 768, 100, 33])
def test_project_back_requantize(parity, size, bits, symmetric, stochastic):
    """Dense updates; those of low rank stand in test_parity_lowrank.py."""
    shapes = [(40, 50), (0, 5), (1, 1), (31, 77), (64, 64), (16, 100)]
    layout = {"bits": bits, "group_size": size}
    parts = [
        quant.quantize_blockwise(values(m * n, seed=m).view(m, n), **layout, symmetric=symmetric)
        for m, n in shapes
    ]
    lists = [[part[i] for part in parts if part[i] is not None] for i in range(3)]
    updates = [values(m * n, seed=n).view(m, n) for m, n in shapes]
    updates[0][:20] = 0  # groups that keep their codes
    updates[3][5, 5:9] = torch.tensor([float("nan"), float("inf"), 1e38, 1e-30])
    options = {**layout, "scale": -1e-2, "stochastic": stochastic, "seed": 11}
    ids = {"tensor_ids": [5, 1, 2, 3, 9, 0], "steps": [3, 3, 3, 4, 5, 6]}
    parity(lowrank.project_back_requantize, *lists, shapes, updates, [], **options, **ids)
    options["decay"] = 0.1
    for flag in (0.0, 1.0, float("nan")):
        found_inf = torch.tensor(flag)
        given = {**options, **ids, "found_inf": found_inf}
        parity(lowrank.project_back_requantize, *lists, shapes, updates, [], **given)
