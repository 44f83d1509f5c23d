import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradpress.train.schedule import lr_multiplier


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.1),
        (9, 0.9),
        (10, 1.0),
        (40, 0.1 + 0.9 * 0.75),  # a third of the way: (1 + cos 60°)/2 = 3/4
        (55, 0.55),  # half-way
        (70, 0.1 + 0.9 * 0.25),
        (100, 0.1),
    ],
)
def test_published_formula(step, expected):
    # 1e-12: a handful of float64 operations on numbers of order one.
    assert lr_multiplier(step, steps=100) == pytest.approx(expected, abs=1e-12)


def test_other_warmup_and_floor():
    assert lr_multiplier(0, steps=10, warmup=0.0) == 1.0
    assert lr_multiplier(9, steps=10, warmup=1.0) == 0.9
    assert lr_multiplier(3, steps=4, warmup=0.0, min_ratio=1.0) == 1.0
    half = 0.5 * (1 + math.cos(math.pi * 3 / 4))
    assert lr_multiplier(3, steps=4, warmup=0.0, min_ratio=0.0) == pytest.approx(half, abs=1e-12)


@given(
    steps=st.integers(1, 10_000),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    data=st.data(),
)
def test_rises_then_falls_within_bounds(steps, warmup, floor, data):
    step = data.draw(st.integers(0, steps - 1))
    here = lr_multiplier(step, steps=steps, warmup=warmup, min_ratio=floor)
    after = lr_multiplier(step + 1, steps=steps, warmup=warmup, min_ratio=floor)
    assert 0.0 <= here <= 1.0 + 1e-12
    if step + 1 <= int(warmup * steps):
        assert after > here
    else:
        assert after <= here + 1e-12
