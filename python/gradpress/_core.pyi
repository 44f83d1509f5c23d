"""
Native core of gradpress; use it through `gradpress.ops`.
"""

from _typeshed import SupportsGetItem
from typing import Any, SupportsFloat, SupportsIndex

__all__ = [
    "accumulate_gradients",
    "adamw_blockwise_direction",
    "adamw_blockwise_step",
    "adamw_direction",
    "adamw_step",
    "compile_kernels",
    "cuda_status",
    "dequantize_blockwise",
    "dequantize_dynamic",
    "kernel_modules",
    "own_threads",
    "pack_int4",
    "project",
    "project_back_add",
    "project_back_requantize",
    "project_back_requantize_workspace",
    "project_factors",
    "project_factors_workspace",
    "project_workspace",
    "prune_columns",
    "quantize_blockwise",
    "quantize_dynamic",
    "refresh_basis",
    "refresh_basis_factors",
    "refresh_basis_factors_workspace",
    "refresh_basis_workspace",
    "round_bf16_stochastic",
    "score_histogram",
    "score_weights",
    "select_below",
    "select_below_workspace",
    "select_groups",
    "select_matrix",
    "select_matrix_workspace",
    "select_rows",
    "set_emulator",
    "set_simd_level",
    "simd_level",
    "simd_levels",
    "svd",
    "svd_workspace",
    "unpack_int4",
    "version",
    "warmup",
]

def accumulate_gradients(
    total: Any, part: Any, nonfinite: Any, squared: bool, scale: SupportsFloat | SupportsIndex
) -> None:
    """
    Adds `|scale part|`, or with `squared` its square, to `total` (float32).

    A term that is not finite is left out, and `nonfinite` (int64) increased by one.
    """

def adamw_blockwise_direction(
    grads: SupportsGetItem[int, Any],
    exp_avg_codes: SupportsGetItem[int, Any],
    exp_avg_scale: SupportsGetItem[int, Any],
    exp_avg_sq_codes: SupportsGetItem[int, Any],
    exp_avg_sq_scale: SupportsGetItem[int, Any],
    steps: SupportsGetItem[int, SupportsIndex],
    nonfinite: Any,
    lr: SupportsFloat | SupportsIndex,
    beta1: SupportsFloat | SupportsIndex,
    beta2: SupportsFloat | SupportsIndex,
    eps: SupportsFloat | SupportsIndex,
    maximize: bool,
    grad_scale: SupportsFloat | SupportsIndex,
    bits: SupportsIndex,
    block_size: SupportsIndex,
    grad_scale_tensor: Any | None = None,
    found_inf: Any | None = None,
    previous_grads: SupportsGetItem[int, Any] | None = None,
    friction: str | None = None,
    lr_tensor: Any | None = None,
    step_tensors: SupportsGetItem[int, Any] | None = None,
) -> None:
    """
    Turns float32 gradients into AdamW's update without decay, times minus the learning rate.

    With `previous_grads` and a `friction` the update is diffGrad's: less of a step is taken where
    the gradient has changed little since the step before. The gradients become the previous ones.
    """

def adamw_blockwise_step(
    params: SupportsGetItem[int, Any],
    grads: SupportsGetItem[int, Any],
    exp_avg_codes: SupportsGetItem[int, Any],
    exp_avg_scale: SupportsGetItem[int, Any],
    exp_avg_sq_codes: SupportsGetItem[int, Any],
    exp_avg_sq_scale: SupportsGetItem[int, Any],
    steps: SupportsGetItem[int, SupportsIndex],
    tensor_ids: SupportsGetItem[int, SupportsIndex],
    nonfinite: Any,
    lr: SupportsFloat | SupportsIndex,
    beta1: SupportsFloat | SupportsIndex,
    beta2: SupportsFloat | SupportsIndex,
    eps: SupportsFloat | SupportsIndex,
    weight_decay: SupportsFloat | SupportsIndex,
    maximize: bool,
    grad_scale: SupportsFloat | SupportsIndex,
    stochastic_rounding: bool,
    seed: SupportsIndex,
    bits: SupportsIndex,
    block_size: SupportsIndex,
    grad_scale_tensor: Any | None = None,
    found_inf: Any | None = None,
    lr_tensor: Any | None = None,
    step_tensors: SupportsGetItem[int, Any] | None = None,
) -> None:
    """
    Steps parameters in place by AdamW with moments of 8 or 4 bits.

    Elements whose gradient is not finite keep parameter and moments, and are added to `nonfinite`.
    Gradients are divided by `grad_scale` and, where it is given, by the one float32 of
    `grad_scale_tensor`; where the one of `found_inf` is not zero nothing is written. The one float32
    of `lr_tensor` takes the place of `lr`, and those of `step_tensors`, of which each tensor has
    one, that of `steps`, which is empty then. All of them are read where the tensors are: nobody
    waits for a device.
    """

def adamw_direction(
    grads: SupportsGetItem[int, Any],
    exp_avg: SupportsGetItem[int, Any],
    exp_avg_sq: SupportsGetItem[int, Any],
    steps: SupportsGetItem[int, SupportsIndex],
    nonfinite: Any,
    lr: SupportsFloat | SupportsIndex,
    beta1: SupportsFloat | SupportsIndex,
    beta2: SupportsFloat | SupportsIndex,
    eps: SupportsFloat | SupportsIndex,
    maximize: bool,
    grad_scale: SupportsFloat | SupportsIndex,
    grad_scale_tensor: Any | None = None,
    found_inf: Any | None = None,
    previous_grads: SupportsGetItem[int, Any] | None = None,
    friction: str | None = None,
    lr_tensor: Any | None = None,
    step_tensors: SupportsGetItem[int, Any] | None = None,
) -> None:
    """
    `adamw_blockwise_direction` with float32 moments.
    """

def adamw_step(
    params: SupportsGetItem[int, Any],
    grads: SupportsGetItem[int, Any],
    exp_avg: SupportsGetItem[int, Any],
    exp_avg_sq: SupportsGetItem[int, Any],
    steps: SupportsGetItem[int, SupportsIndex],
    tensor_ids: SupportsGetItem[int, SupportsIndex],
    nonfinite: Any,
    lr: SupportsFloat | SupportsIndex,
    beta1: SupportsFloat | SupportsIndex,
    beta2: SupportsFloat | SupportsIndex,
    eps: SupportsFloat | SupportsIndex,
    weight_decay: SupportsFloat | SupportsIndex,
    maximize: bool,
    grad_scale: SupportsFloat | SupportsIndex,
    stochastic_rounding: bool,
    seed: SupportsIndex,
    grad_scale_tensor: Any | None = None,
    found_inf: Any | None = None,
    lr_tensor: Any | None = None,
    step_tensors: SupportsGetItem[int, Any] | None = None,
) -> None:
    """
    Steps parameters in place by AdamW with float32 moments; see `adamw_blockwise_step`.
    """

def compile_kernels(
    architecture: SupportsIndex, files: SupportsGetItem[int, str] | None = None
) -> list[tuple[str, list[str], int]]:
    """
    Compiles modules for `sm_{architecture}` into the cache, for which no device is needed.

    `files` of `kernels/` are compiled, or all of them. Returns the file, the defines and the size
    of each module.
    """

def cuda_status() -> str:
    """
    Devices, driver and compiler of CUDA, or why there are none, as text.
    """

def dequantize_blockwise(
    codes: Any,
    scale: Any,
    zero_point: Any | None,
    out: Any,
    bits: SupportsIndex,
    group_size: SupportsIndex,
) -> None:
    """
    Writes the values behind `codes` into `out`, the inverse of `quantize_blockwise`.
    """

def dequantize_dynamic(
    codes: Any, scale: Any, out: Any, signed: bool, bits: SupportsIndex, block_size: SupportsIndex
) -> None:
    """
    Writes the values behind dynamic codes into `out`.
    """

def kernel_modules() -> list[tuple[str, list[str], list[str]]]:
    """
    Every module that the CUDA halves of the ops may need: file of `kernels/`, defines, kernels.
    """

def own_threads() -> None:
    """
    Says that PyTorch's threads belong to this process. Called when the package is imported: a fork
    from then on has none of them, and does not wait for them.
    """

def pack_int4(codes: Any, packed: Any) -> None:
    """
    Packs 4-bit codes (uint8, 0 to 15) two to the byte, the first in the low nibble.
    """

def project(
    grads: SupportsGetItem[int, Any],
    bases: SupportsGetItem[int, Any],
    outs: SupportsGetItem[int, Any],
    basis_grids: tuple[
        SupportsGetItem[int, Any], SupportsGetItem[int, Any], SupportsIndex, SupportsIndex
    ]
    | None = None,
    workspace: Any | None = None,
) -> None:
    """
    Projects gradients (`[m, n]`) with bases (`[min(m, n), rank]`) into `outs` (float32).

    For m >= n an output is `grad @ basis`, `[m, rank]`; otherwise `basis.T @ grad`, `[rank, n]`.
    Bases are float32; or, with `basis_grids` (scales, zero points, bits, group size), codes of
    `quantize_blockwise`.
    `workspace` (uint8) has the size of `project_workspace` on devices.
    """

def project_back_add(
    params: SupportsGetItem[int, Any],
    updates: SupportsGetItem[int, Any],
    bases: SupportsGetItem[int, Any],
    scale: SupportsFloat | SupportsIndex,
    decay: SupportsFloat | SupportsIndex,
    stochastic_rounding: bool,
    seed: SupportsIndex,
    tensor_ids: SupportsGetItem[int, SupportsIndex],
    steps: SupportsGetItem[int, SupportsIndex],
    found_inf: Any | None = None,
    basis_grids: tuple[
        SupportsGetItem[int, Any], SupportsGetItem[int, Any], SupportsIndex, SupportsIndex
    ]
    | None = None,
) -> None:
    """
    `params = params * (1 - decay) + scale * back(update)`, in place, rounded once.

    The random numbers' `tensor_ids` and `steps` have an entry for each parameter. Where `found_inf`
    (one float32) is given and not zero, nothing is written. Bases are those of `project`.
    """

def project_back_requantize(
    codes: SupportsGetItem[int, Any],
    scales: SupportsGetItem[int, Any],
    zero_points: SupportsGetItem[int, Any],
    shapes: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex]],
    updates: SupportsGetItem[int, Any],
    bases: SupportsGetItem[int, Any],
    bits: SupportsIndex,
    group_size: SupportsIndex,
    scale: SupportsFloat | SupportsIndex,
    decay: SupportsFloat | SupportsIndex,
    stochastic: bool,
    seed: SupportsIndex,
    tensor_ids: SupportsGetItem[int, SupportsIndex],
    steps: SupportsGetItem[int, SupportsIndex],
    found_inf: Any | None = None,
    basis_grids: tuple[
        SupportsGetItem[int, Any], SupportsGetItem[int, Any], SupportsIndex, SupportsIndex
    ]
    | None = None,
    workspace: Any | None = None,
) -> None:
    """
    `weights = round(weights * (1 - decay) + scale * back(update))` on quantized weights, in place.

    Where `bases` is empty the updates are dense, `[m, n]`. Groups in which nothing changes keep
    their codes and grids bit for bit; where `found_inf` (one float32) is given and not zero, all do.
    Bases are those of `project`; `workspace` (uint8) has the size of
    `project_back_requantize_workspace` on devices.
    """

def project_back_requantize_workspace(
    shapes: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex]],
    bits: SupportsIndex,
    group_size: SupportsIndex,
) -> int:
    """
    Bytes of workspace that `project_back_requantize` takes on a device, for rows and columns of each
    weight; dense updates take none.
    """

def project_factors(
    grad_outputs: SupportsGetItem[int, Any],
    inputs: SupportsGetItem[int, Any],
    bases: SupportsGetItem[int, Any],
    outs: SupportsGetItem[int, Any],
    basis_grids: tuple[
        SupportsGetItem[int, Any], SupportsGetItem[int, Any], SupportsIndex, SupportsIndex
    ]
    | None = None,
    workspace: Any | None = None,
) -> None:
    """
    `project` of gradients that are products, ``grad_outputs.T @ inputs``, and never formed.

    `grad_outputs` (`[tokens, m]`) and `inputs` (`[tokens, n]`) have one dtype. For m >= n an output
    is `grad_outputs.T @ (inputs @ basis)`; otherwise `(grad_outputs @ basis).T @ inputs`.
    `workspace` (uint8) has the size of `project_factors_workspace` on devices.
    """

def project_factors_workspace(
    shapes: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex, SupportsIndex]],
    plain: bool,
) -> int:
    """
    Bytes of workspace that `project_factors` takes on a device, for tokens, rows, columns and rank of
    each gradient; `plain` where factors are float32.
    """

def project_workspace(
    shapes: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex]], plain: bool
) -> int:
    """
    Bytes of workspace that `project` takes on a device, for rows, columns and rank of each gradient;
    `plain` where some gradient is float32, and so are the bases.
    """

def prune_columns(
    weight: Any,
    factor: Any,
    mask: Any,
    errors: Any,
    loss: Any,
    size: SupportsIndex | None,
    drop: SupportsIndex,
) -> None:
    """
    Zeroes weights of a block of columns, one column after the other, and adds what later columns
    of the block make up for it; `factor` is the block of the upper Cholesky factor of the inverse
    Hessian.

    Where `mask` is 0 a weight goes; with `size` the mask is written: all but the `drop` least of
    `|weight| / factor[j, j]` in every `size` columns, at the time the first of them is reached.
    `errors` gets what the columns after the block have to make up for, `loss` the sum of their
    squares in each row.
    """

def quantize_blockwise(
    x: Any,
    codes: Any,
    scale: Any,
    zero_point: Any | None,
    nonfinite: Any,
    bits: SupportsIndex,
    stochastic: bool,
    group_size: SupportsIndex,
    seed: SupportsIndex,
    tensor_id: SupportsIndex,
    step: SupportsIndex,
) -> None:
    """
    Quantizes `x` in groups of `group_size` consecutive elements.

    Written are `codes`, `scale` (float32, one per group) and, for affine codes, `zero_point`
    (uint8, one per group). `nonfinite` (int64) is increased by the number of NaN and infinite
    values, which count as zero and as the extremes of their group's finite values.
    """

def quantize_dynamic(
    x: Any,
    codes: Any,
    scale: Any,
    nonfinite: Any,
    signed: bool,
    bits: SupportsIndex,
    block_size: SupportsIndex,
) -> None:
    """
    Quantizes `x` with the map of first moments (`signed`) or of second moments, of 8 or 4 bits.

    `scale` is the largest magnitude of each block; codes of 4 bits are packed. `nonfinite` (int64)
    is increased by the number of values not finite, which count as zero (NaN) and as the extremes
    of the block's finite values.
    """

def refresh_basis(
    grads: SupportsGetItem[int, Any],
    bases: SupportsGetItem[int, Any],
    vectors: SupportsGetItem[int, Any],
    outcomes: Any,
    warm: SupportsGetItem[int, bool],
    seed: SupportsIndex,
    tensor_ids: SupportsGetItem[int, SupportsIndex],
    steps: SupportsGetItem[int, SupportsIndex],
    workspace: Any | None = None,
) -> None:
    """
    Finds the projectors of gradients anew.

    `bases` (`[min(m, n), rank]`, float32) and `vectors` (`[min(m, n)]`, the leading direction) are
    read where `warm` says that they hold an earlier basis, and written. So is a row of `outcomes`
    (`[gradients, 3]`, float64) for each gradient: a status (0 refreshed, 1 zero gradient, 2 kept
    because of NaN or infinite values), the cosine of the leading directions before and after, and
    the share of the squared norm captured. `workspace` (uint8) has the size of
    `refresh_basis_workspace` on devices.
    """

def refresh_basis_factors(
    grad_outputs: SupportsGetItem[int, Any],
    inputs: SupportsGetItem[int, Any],
    bases: SupportsGetItem[int, Any],
    vectors: SupportsGetItem[int, Any],
    outcomes: Any,
    warm: SupportsGetItem[int, bool],
    seed: SupportsIndex,
    tensor_ids: SupportsGetItem[int, SupportsIndex],
    steps: SupportsGetItem[int, SupportsIndex],
    workspace: Any | None = None,
) -> None:
    """
    `refresh_basis` of gradients that are products, ``grad_outputs.T @ inputs``, and never formed.

    `grad_outputs` (`[tokens, m]`) and `inputs` (`[tokens, n]`) have one dtype. `workspace` (uint8)
    has the size of `refresh_basis_factors_workspace` on devices.
    """

def refresh_basis_factors_workspace(
    shapes: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex, SupportsIndex]],
) -> int:
    """
    Bytes of workspace that `refresh_basis_factors` takes on a device, for tokens, rows, columns and
    rank of each gradient.
    """

def refresh_basis_workspace(
    shapes: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex]],
) -> int:
    """
    Bytes of workspace that `refresh_basis` takes on a device, for rows, columns and rank of each
    gradient.
    """

def round_bf16_stochastic(
    x: Any, out: Any, seed: SupportsIndex, tensor_id: SupportsIndex, step: SupportsIndex
) -> None:
    """
    Rounds float32 `x` stochastically into bfloat16 `out` of the same shape.
    """

def score_histogram(
    weight: Any,
    scale: Any | None,
    grad: Any | None,
    state: Any,
    counts: Any,
    alpha: SupportsFloat | SupportsIndex,
    given: bool,
    half: bool,
    shift: SupportsIndex,
) -> None:
    """
    Adds to `counts` (int64, 2048) how many scores' keys have which digit: the bits from `shift` on,
    which is 21, 10 or 0, up to the next of them, of keys whose bits above are those of `state[0]`.

    A key is the score's bits as an unsigned integer, in the order of the scores.
    """

def score_weights(
    weight: Any,
    scale: Any | None,
    grad: Any | None,
    out: Any,
    alpha: SupportsFloat | SupportsIndex,
    half: bool,
) -> None:
    """
    Writes the scores of a matrix: `|weight|`, times `scale` of the column plus `alpha |grad|`.

    `half` rounds the gradient's product to float16 and leaves `alpha` out, as the papers' code.
    """

def select_below(
    weight: Any,
    scale: Any | None,
    grad: Any | None,
    state: Any,
    mask: Any,
    nan: Any,
    workspace: Any,
    alpha: SupportsFloat | SupportsIndex,
    given: bool,
    half: bool,
) -> None:
    """
    Marks in `mask` (uint8) the scores whose keys are above `state[0]`, and those that equal it but
    for the first `state[1]` of them, of the `state[2]` that this matrix and the following have.

    Both numbers are decreased by what this matrix has; they stay where none is dropped, or all.
    """

def select_below_workspace(numel: SupportsIndex) -> int:
    """
    Elements of `workspace` of `select_below` for a matrix of so many.
    """

def select_groups(
    weight: Any,
    scale: Any | None,
    grad: Any | None,
    mask: Any,
    nan: Any,
    alpha: SupportsFloat | SupportsIndex,
    given: bool,
    half: bool,
    drop: SupportsIndex,
    size: SupportsIndex,
) -> None:
    """
    The same among every `size` consecutive columns of a row.
    """

def select_matrix(
    weight: Any,
    scale: Any | None,
    grad: Any | None,
    mask: Any,
    nan: Any,
    workspace: Any,
    alpha: SupportsFloat | SupportsIndex,
    given: bool,
    half: bool,
    drop: SupportsIndex,
    through: bool,
) -> None:
    """
    The same among all weights of a matrix; `through` drops one more, and all that equal the last.

    `workspace` (int64) holds zeros, as many as `select_matrix_workspace` says.
    """

def select_matrix_workspace(numel: SupportsIndex) -> int:
    """
    Elements of `workspace` of `select_matrix` for a matrix of so many.
    """

def select_rows(
    weight: Any,
    scale: Any | None,
    grad: Any | None,
    mask: Any,
    nan: Any,
    alpha: SupportsFloat | SupportsIndex,
    given: bool,
    half: bool,
    drop: SupportsIndex,
) -> None:
    """
    Marks in `mask` (uint8) all but the `drop` least scores of every row, of equal ones the later.

    `given` takes `weight` for the scores themselves. A score that is not a number is kept like an
    infinite one, and `nan` (int64) increased by one.
    """

def set_emulator(
    build: Any | None,
    order: SupportsIndex = 0,
    seed: SupportsIndex = 0,
    list_capacity: SupportsIndex = ...,
) -> None:
    """
    Makes ops on CPU tensors take their CUDA half, on kernels compiled for the CPU: for tests.

    `build` is called with a file of `kernels/` and defines, and returns the path of a library that
    `tests/emulator/build.py` made; None switches back. `order` and `seed` decide which thread runs
    when (the emulator's README); `list_capacity` is how many tensors one launch takes.
    """

def set_simd_level(level: str) -> None:
    """
    Makes the CPU kernels use an instruction set that this processor offers.
    """

def simd_level() -> str:
    """
    The instruction set the CPU kernels use: "scalar", "avx2" or "avx512".
    """

def simd_levels() -> list[str]:
    """
    The instruction sets that this processor offers.
    """

def svd(
    x: Any,
    u: Any,
    s: Any,
    vh: Any,
    outcome: Any,
    n_iter: SupportsIndex,
    oversample: SupportsIndex,
    seed: SupportsIndex,
    workspace: Any | None = None,
) -> None:
    """
    Randomized SVD of `x` (`[m, n]`): writes `u` (`[m, rank]`), `s` (`[rank]`) and `vh`
    (`[rank, n]`), float32.

    The first element of `outcome` (`[3]`, float64) becomes 0, or 2 where `x` is not finite or no
    basis could be found, and nothing else is written. `workspace` (uint8) has the size of
    `svd_workspace` on devices.
    """

def svd_workspace(
    rows: SupportsIndex, columns: SupportsIndex, rank: SupportsIndex, oversample: SupportsIndex
) -> int:
    """
    Bytes of workspace that `svd` takes on a device.
    """

def unpack_int4(packed: Any, codes: Any) -> None:
    """
    Unpacks what `pack_int4` packed; the number of codes is that of `codes`.
    """

def version() -> str:
    """
    The version of the native core.
    """

def warmup(ordinal: SupportsIndex, files: SupportsGetItem[int, str] | None = None) -> None:
    """
    Compiles and loads kernels for CUDA device `ordinal`: those of some files, or all of them.
    """
