"""Kernels on PyTorch's threads, in forks of a process, and from many threads at a time."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gradpress.ops import lowrank, quant

FORK = """
import os, signal, sys, warnings
import numpy as np
import torch
from gradpress.ops import quant

warnings.simplefilter("ignore")  # a fork of a process with threads is what is tried
torch.set_num_threads(2)
x = torch.randn(1 << 20)
torch.mm(torch.randn(512, 512), torch.randn(512, 512))
want = quant.quantize_blockwise(x, seed=1)
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a child that waits for threads it does not have
    found = quant.quantize_blockwise(x, seed=1)
    # Not by PyTorch's operations, which would wait.
    same = all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(found[:3], want[:3]))
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
after = quant.quantize_blockwise(x, seed=1)
assert all(torch.equal(a, b) for a, b in zip(after[:3], want[:3]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_fork_does_not_wait_for_threads_it_does_not_have():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [2, 5])
def test_calls_from_many_threads_at_a_time(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 18, generator=generator)
    grad = torch.randn(700, 300, generator=generator)
    basis = torch.randn(300, 40, generator=generator)
    exact = grad.double() @ basis.double()

    def work(_):
        torch.set_num_threads(count)
        codes = quant.quantize_blockwise(x, seed=7)[0]
        out = torch.empty(700, 40)
        lowrank.project([grad], [basis], [out])
        return codes, out

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = quant.quantize_blockwise(x, seed=7)[0]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(12)))
    finally:
        torch.set_num_threads(before)
    for codes, out in results:
        assert torch.equal(codes, want)
        # float32 sums of 300 terms.
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-3)
