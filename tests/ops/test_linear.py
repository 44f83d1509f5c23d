"""Products with quantized weights, a part at a time, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradpress.ops import linear, quant

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def quantized(rows, columns, bits, group_size, symmetric=False):
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=generator)
    layout = {"bits": bits, "group_size": group_size}
    parts = quant.quantize_blockwise(values, **layout, symmetric=symmetric, rounding="nearest")
    exact = quant.dequantize_blockwise(*parts[:3], shape=(rows, columns), **layout)
    return linear.Codes(*parts[:3], (rows, columns), bits, group_size), exact.double()


@given(
    rows=st.integers(0, 70),
    columns=st.integers(1, 70),
    tokens=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([1, 7, 16, 32, 256]),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
)
def test_against_float64(rows, columns, tokens, bits, group_size, dtype, symmetric):
    weight, exact = quantized(rows, columns, bits, group_size, symmetric)
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(*tokens, columns, generator=generator, dtype=torch.float32).to(dtype)
    grad = torch.randn(*tokens, rows, generator=generator, dtype=torch.float32).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    # One rounding to the dtype, and float32 sums of up to 70 terms; the bias is one more rounding.
    tolerance = {torch.float64: 1e-4, torch.float32: 1e-4}.get(dtype, 0.03)
    for got, want in (
        (linear.linear_blockwise(x, weight, None), x.double() @ exact.T),
        (linear.linear_blockwise(x, weight, bias), x.double() @ exact.T + bias.double()),
        (linear.linear_blockwise_input_grad(grad, weight), grad.double() @ exact),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(300, 512, 128), (512, 256, 256), (1030, 333, 256)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_parts_cover_a_weight_once_and_are_small(rows, columns, group_size, bits):
    weight, exact = quantized(rows, columns, bits, group_size)
    pieces = [weight.rows(*part, torch.float32) for part in weight.row_parts()]
    assert torch.equal(torch.cat(pieces).double(), exact)
    assert max(piece.numel() for piece in pieces) <= exact.numel() // 2
    for first, last, piece in weight.all_rows(torch.float32):
        assert torch.equal(piece.double(), exact[first:last])
    columns_of = weight.column_parts()
    if columns % group_size or columns == group_size:
        assert columns_of is None
    else:
        pieces = [weight.columns(*part, torch.float32) for part in columns_of]
        assert torch.equal(torch.cat(pieces, dim=1).double(), exact)
        assert max(piece.numel() for piece in pieces) <= exact.numel() // 2


def test_inputs_of_any_layout():
    weight, exact = quantized(60, 128, 8, 64)
    x, grad = torch.randn(128, 9).T, torch.randn(60, 9).T
    torch.testing.assert_close(
        linear.linear_blockwise(x, weight, None).double(),
        x.double() @ exact.T,
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        linear.linear_blockwise_input_grad(grad, weight).double(),
        grad.double() @ exact,
        rtol=1e-4,
        atol=1e-4,
    )
