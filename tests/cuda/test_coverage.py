"""Every op of the core has a CUDA half that is compared with the CPU, or is named here."""

import ast
from pathlib import Path

import pytest
import torch
from tests.cuda.devices import emulator

from gradpress import _core
from gradpress.ops import lowrank

#: What the core offers that is no op on tensors.
RUNTIME = {
    *("version", "simd_level", "simd_levels", "set_simd_level"),
    *("cuda_status", "warmup", "compile_kernels", "set_emulator"),
}
#: Ops without a CUDA half.
NOT_YET = {"project", "project_back_add", "refresh_basis", "svd"}


def parity_tests():
    names = set()
    for path in Path(__file__).parent.glob("test_parity_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(a.arg == "parity" for a in node.args.args):
                names.add(node.name.removeprefix("test_"))
    return names


def test_every_op_has_a_parity_test():
    ops = set(_core.__all__) - RUNTIME
    assert ops >= NOT_YET
    assert ops - NOT_YET - parity_tests() == set()
    assert NOT_YET & parity_tests() == set()


def test_what_has_no_kernels_says_so():
    x, basis = torch.randn(6, 4), torch.eye(4, 2)
    update, vector = torch.zeros(6, 2), torch.zeros(4)
    ids = {"seed": 0, "tensor_ids": [0], "steps": [1]}
    calls = {
        "project": lambda: lowrank.project([x], [basis], [update]),
        "project_back_add": lambda: lowrank.project_back_add(
            [x], [update], [basis], scale=1.0, **ids
        ),
        "refresh_basis": lambda: lowrank.refresh_basis([x], [basis], [vector], warm=[False], **ids),
        "svd": lambda: lowrank.svd(x, rank=2, n_iter=1, oversample=1, seed=0),
    }
    assert set(calls) == NOT_YET
    for name, call in calls.items():
        with emulator(), pytest.raises(NotImplementedError, match=f"^{name}: not implemented on"):
            call()
