//! Native core of gradpress. This file lists what Python sees, and nothing else.

pub mod cpu;
pub mod cuda;
mod dispatch;
pub mod error;
pub mod lowrank;
pub mod optim;
pub mod prune;
pub mod quant;
pub mod rng;
mod runtime;
pub mod tensor;

use pyo3::prelude::*;

/// Native core of gradpress; use it through `gradpress.ops`.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::lowrank::{
        project, project_back_add, project_back_requantize, project_back_requantize_workspace,
        project_factors, project_factors_workspace, project_workspace, refresh_basis,
        refresh_basis_factors, refresh_basis_factors_workspace, refresh_basis_workspace, svd,
        svd_workspace,
    };
    #[pymodule_export]
    use crate::optim::{
        adamw_blockwise_direction, adamw_blockwise_step, adamw_direction, adamw_step,
    };
    #[pymodule_export]
    use crate::prune::{
        accumulate_gradients, prune_columns, score_histogram, score_weights, select_below,
        select_below_workspace, select_groups, select_matrix, select_matrix_workspace, select_rows,
    };
    #[pymodule_export]
    use crate::quant::{
        dequantize_blockwise, dequantize_dynamic, pack_int4, quantize_blockwise, quantize_dynamic,
        round_bf16_stochastic, unpack_int4,
    };
    #[pymodule_export]
    use crate::runtime::{
        compile_kernels, cuda_status, kernel_modules, own_threads, set_emulator, set_simd_level,
        simd_level, simd_levels, version, warmup,
    };
}
