"""The modules, compiled side by side before the first test that needs one."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.kernels import launch


@pytest.fixture(scope="session", autouse=True)
def _modules():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(launch.build_one, launch.EMULATED))
