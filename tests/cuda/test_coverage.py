"""Every op of the core has a CUDA half that is compared with the CPU."""

import ast
from pathlib import Path

from gradpress import _core

#: What the core offers that is no op on tensors.
RUNTIME = {
    *("version", "own_threads", "simd_level", "simd_levels", "set_simd_level"),
    *("cuda_status", "warmup", "compile_kernels", "kernel_modules", "set_emulator"),
    *("project_workspace", "project_back_requantize_workspace"),
    *("refresh_basis_workspace", "svd_workspace"),
    *("select_matrix_workspace", "select_below_workspace"),
    *("project_factors_workspace", "refresh_basis_factors_workspace"),
}


def parity_tests():
    names = set()
    for path in Path(__file__).parent.glob("test_parity_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(a.arg == "parity" for a in node.args.args):
                names.add(node.name.removeprefix("test_"))
    return names


def test_every_op_has_a_parity_test():
    ops = set(_core.__all__) - RUNTIME
    assert len(ops) >= 16
    assert ops - parity_tests() == set()
