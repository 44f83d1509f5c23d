"""Fixtures and hypothesis profiles that all tests share."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from gradpress.ops import runtime

# What the tests compute is small: threads would only wait for each other, and for other processes.
torch.set_num_threads(1)

settings.register_profile(
    "fast",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile("slow", parent=settings.get_profile("fast"), max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def restore_level():
    before = runtime.simd_level()
    yield
    runtime.set_simd_level(before)
