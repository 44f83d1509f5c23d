"""update.cu gives the bits of the CPU."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels import launch
from tests.kernels.inputs import GROUPS, SIZES, normal
from tests.kernels.launch import ORDERS, Guarded, Shape, address, same_bits

from gradpress import _core
from gradpress.ops import quant

SEED = 0xFEDCBA9876543210


class Weights:
    """Quantized weights with an update each."""

    def __init__(self, numels, bits, size, symmetric, updates=None):
        self.numels, self.bits, self.size = numels, bits, size
        made = [
            quant.quantize_blockwise(
                normal(numel, i), bits=bits, group_size=size, symmetric=symmetric
            )
            for i, numel in enumerate(numels)
        ]
        self.codes = [m.codes.view(torch.uint8) for m in made]
        self.scales = [m.scale for m in made]
        self.zero_points = [] if symmetric else [m.zero_point for m in made]
        self.updates = updates or [normal(n, 50 + i, 0.02) for i, n in enumerate(numels)]
        self.ids = [(3 * i + 1, 7 + i) for i in range(len(numels))]

    def on_cpu(self, keep, alpha, stochastic):
        codes, scales = [c.clone() for c in self.codes], [s.clone() for s in self.scales]
        zero_points = [z.clone() for z in self.zero_points]
        symmetric = not zero_points
        _core.project_back_requantize(
            [
                (c.view(torch.int8) if symmetric else c).view(1, -1) if self.bits == 8 else c
                for c in codes
            ],
            scales,
            zero_points,
            [(1, numel) for numel in self.numels],
            [update.view(1, -1) for update in self.updates],
            [],
            self.bits,
            self.size,
            alpha,
            1.0 - keep,
            stochastic,
            SEED,
            [i for i, _ in self.ids],
            [step for _, step in self.ids],
        )
        return codes, scales, zero_points

    def by_kernel(self, keep, alpha, stochastic, order, any_size=None, offset=0, found_inf=None):
        guard, shape = Guarded(), Shape(self.size, self.bits, any_size)
        codes = [guard.copy(c, offset) for c in self.codes]
        scales = [guard.copy(s) for s in self.scales]
        zero_points = [guard.copy(z) for z in self.zero_points]
        arguments, blocks = launch.WeightList(), 0
        for i, numel in enumerate(self.numels):
            entry = arguments.tensors[i]
            entry.codes, entry.scale = address(codes[i]), address(scales[i])
            entry.zero_point = address(zero_points[i]) if zero_points else None
            entry.update, entry.numel = address(self.updates[i]), numel
            entry.first_block, (entry.tensor_id, entry.step) = blocks, self.ids[i]
            entry.keep, entry.alpha = keep, alpha
            blocks += shape.blocks(numel)
        rounding = (self.size, self.bits, int(stochastic), *launch.key_words(SEED, 0))
        launch.module("update.cu").launch(
            "requantize_dense" + shape.suffix,
            blocks,
            shape.block,
            [arguments, len(self.numels), found_inf, *rounding, *shape.extra],
            **order,
        )
        guard.check()
        return codes, scales, zero_points

    def check(self, keep, alpha, stochastic, order, **options):
        got = self.by_kernel(keep, alpha, stochastic, order, **options)
        want = self.on_cpu(keep, alpha, stochastic)
        for what, a, b in zip(("codes", "scale", "zero_point"), got, want, strict=True):
            for i in range(len(a)):
                assert same_bits(a[i], b[i]), (what, i, self.numels[i], self.size, order)
        return got


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_size(bits, symmetric):
    orders = itertools.cycle(ORDERS)
    for size, stochastic in itertools.product(GROUPS, (False, True)):
        weights = Weights(list(SIZES), bits, size, symmetric)
        weights.check(0.999, 1.0, stochastic, next(orders))


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o["order"])
@pytest.mark.parametrize("size", [64, 1024, 33, 700])
def test_in_every_order(size, order):
    for bits, symmetric in itertools.product((4, 8), (False, True)):
        Weights([4097, 0, 300, 5], bits, size, symmetric).check(1.0, -0.5, True, order)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 256, 2048, 9])
def test_updates_that_are_not_finite_or_do_nothing(size, bits):
    holes = normal(3000, 1, 0.1)
    holes[::50] = float("nan")
    holes[1::70] = float("inf")
    holes[2::90] = -3e38
    some = torch.zeros(3000)
    some[1000:1010] = 0.5
    nothing = torch.zeros(3000)
    weights = Weights([3000] * 3, bits, size, False, [holes, some, nothing])
    got = weights.check(1.0, 2.0, True, ORDERS[2])
    assert same_bits(got[0][2], weights.codes[2])
    assert not same_bits(got[0][1], weights.codes[1])
    touched = torch.zeros(got[1][1].numel(), dtype=torch.bool)
    touched[1000 // size : 1009 // size + 1] = True
    assert same_bits(got[1][1][~touched], weights.scales[1][~touched])
    weights.check(0.9, 2.0, True, ORDERS[1])


@pytest.mark.parametrize("any_size", [False, True])
def test_the_sign_of_zero_is_no_change(any_size):
    weights = Weights([64], 8, 64, True, [torch.full((64,), -0.0)])
    weights.codes[0].zero_()
    weights.check(-1.0, 1.0, True, ORDERS[0], any_size=any_size)


@pytest.mark.parametrize("size", [64, 13])
def test_found_inf_leaves_everything_untouched(size):
    weights = Weights([500, 40], 8, size, False)
    for flag in (0.0, 1.0, float("nan")):
        found = torch.tensor([flag])
        got = weights.by_kernel(0.9, 1.0, True, ORDERS[0], found_inf=found)
        same = all(same_bits(a, b) for a, b in zip(got[0], weights.codes, strict=True))
        assert same == (flag != 0.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_both_kernels_agree_on_plain_sizes_and_any_address(bits):
    weights = Weights([1000, 3000], bits, 128, True)
    weights.check(1.0, 1.0, True, ORDERS[1], any_size=True)
    weights.check(1.0, 1.0, True, ORDERS[2], offset=1)


@given(
    numel=st.integers(1, 1200),
    size=st.one_of(st.integers(1, 1300), st.sampled_from(GROUPS)),
    bits=st.sampled_from((4, 8)),
    symmetric=st.booleans(),
    stochastic=st.booleans(),
    alpha=st.sampled_from((0.0, 1e-8, 1e-3, 1.0, 1e30)),
    keep=st.sampled_from((1.0, 0.99, 0.0)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_anything(numel, size, bits, symmetric, stochastic, alpha, keep, seed):
    weights = Weights([numel], bits, min(size, numel), symmetric, [normal(numel, seed)])
    weights.check(keep, alpha, stochastic, ORDERS[seed % 3])
