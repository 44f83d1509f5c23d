"""Back-projection into weights: the update against float64, what becomes of weights bit for bit."""

import pytest
import torch
from tests.cuda.devices import ORDERS as NUMBERS
from tests.cuda.devices import emulator
from tests.kernels_lowrank.launcher import Back, Basis, Schedule
from tests.kernels_lowrank.test_project import ORDERS, quantized, rounding

from gradpress.ops import lowrank, quant

#: Rows, columns, rank. Tiles have 32 x 256 elements.
SHAPES = [(70, 300, 5), (300, 70, 17), (40, 512, 32), (1, 1, 1), (33, 96, 33)]
KEEP, ALPHA, DECAY = 1 - 0.01, 0.25, 0.01
WHERE = {"seed": 5, "tensor_ids": [3], "steps": [9]}


def make(rows, columns, rank, tensor=1, scale=1.0):
    generator = torch.Generator().manual_seed(rows * columns + rank)
    short = min(rows, columns)
    update = torch.randn(lowrank.projected_shape(rows, columns, rank), generator=generator)
    basis = torch.randn(short, rank, generator=generator) / short**0.5
    back = Back(rows, columns, rank, 0.1 * scale * update, Basis(basis), tensor)
    return back, torch.randn(rows, columns, generator=generator) * scale


def factors(back):
    update, basis = back.update.double(), back.basis.values.double()
    return (update, basis.T) if back.rows >= back.columns else (basis, update)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tensor", [0, 1])
def test_update(tensor, order):
    for shape, scale in zip(SHAPES, [1.0, 1e-30, 1e25, 1.0, 1.0], strict=True):
        back, _ = make(*shape, tensor, scale)
        left, right = factors(back)
        # Three products of halves leave out less than 2^-16 of an element.
        bound = (rounding(back.rank) + tensor * 3 * 2.0**-17) * (left.abs() @ right.abs())
        assert ((back.dense(Schedule(order)) - left @ right).abs() <= bound).all()


def test_some_rows_of_an_update():
    back, _ = make(*SHAPES[0])
    assert torch.equal(back.dense(Schedule("random"), 37, 20), back.dense(Schedule())[37:57])


def test_codes_of_the_basis_are_the_numbers_that_they_stand_for():
    cases = [((70, 300, 5), 4, 7), ((300, 70, 17), 4, 256), ((40, 512, 32), 8, 64)]
    for (shape, bits, group_size), tensor in zip(cases, (0, 0, 1), strict=True):
        back, _ = make(*shape, tensor)
        codes, values = quantized(back.basis.values, bits, group_size, False)
        back.basis = Basis(values)
        expected = back.dense(Schedule())
        back.basis = codes
        assert torch.equal(back.dense(Schedule("random")), expected)


@pytest.mark.parametrize("order", NUMBERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_requantized_as_on_the_cpu(bits, order):
    """Given the same updates, every bit: in one pass, and in two (7, 300, 1000)."""
    for number, shape in enumerate(SHAPES):
        back, w = make(*shape)
        # Not finite, and none in most places.
        back.update[0, 0] = float("nan")
        update = back.dense(Schedule())
        for group_size in (7, 32, 256, 300, 1000):
            for symmetric, stochastic in ((False, True), (True, number % 2 == 0)):
                layout = {"bits": bits, "group_size": group_size}
                before = quant.quantize_blockwise(
                    w, **layout, symmetric=symmetric, rounding="nearest"
                )
                options = {**layout, "scale": ALPHA, "decay": DECAY, "stochastic": stochastic}

                def updated(updates, bases, start=before, options=options, shape=w.shape):
                    parts = [[] if t is None else [t.clone()] for t in start[:3]]
                    lowrank.project_back_requantize(
                        *parts, [tuple(shape)], updates, bases, **options, **WHERE
                    )
                    return [t for part in parts for t in part]

                expected = updated([update], [])
                with emulator(order, seed=number):
                    got = updated([back.update], [back.basis.values])
                where = (shape, group_size, symmetric, stochastic)
                assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True)), where


@pytest.mark.parametrize("order", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_added_to_parameters(dtype, order):
    for shape in SHAPES:
        back, w = make(*shape, tensor=int(dtype != torch.float32))
        param = w.to(dtype)
        update = back.dense(Schedule())
        keep, alpha = torch.tensor(KEEP), torch.tensor(ALPHA)
        exact = param.float() * keep + alpha * update
        for stochastic in (False, dtype == torch.bfloat16):
            got = param.clone()
            with emulator(order, seed=3):
                lowrank.project_back_add(
                    [got], [back.update], [back.basis.values], scale=ALPHA, decay=DECAY,
                    stochastic_rounding=stochastic, **WHERE,
                )  # fmt: skip
            expected = exact.to(dtype)
            if stochastic:
                expected = quant.round_bf16_stochastic(exact, seed=5, tensor_id=3, step=9)
            assert torch.equal(got, expected)
