"""The fixtures' kernels, compiled once."""

from pathlib import Path

import pytest
from tests.emulator.build import EmulatedModule

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def basics():
    return EmulatedModule(FIXTURES / "basics.cu")


@pytest.fixture(scope="session")
def warps():
    return EmulatedModule(FIXTURES / "warps.cu")


@pytest.fixture(scope="session")
def faulty():
    return EmulatedModule(
        FIXTURES / "faulty.cu", sanitize=False
    )  # the sanitizer would end the process
