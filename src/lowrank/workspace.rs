//! How large the workspaces are that ops take on devices; on the CPU they need none. What an op
//! refuses takes none either: the op says what is wrong.

use pyo3::prelude::*;

use super::cuda;
use crate::quant::grid::Format;

/// Whether a matrix of this size can exist, so that nothing overflows.
fn exists(rows: usize, columns: usize) -> bool {
    rows.checked_mul(columns).is_some_and(|n| n <= isize::MAX as usize >> 8)
}

fn has_rank((rows, columns, rank): (usize, usize, usize)) -> bool {
    exists(rows, columns) && rank >= 1 && rank <= rows.min(columns)
}

fn is_product((tokens, rows, columns, rank): (usize, usize, usize, usize)) -> bool {
    exists(tokens, rows.max(columns)) && has_rank((rows, columns, rank))
}

/// Bytes of workspace that `project` takes on a device, for rows, columns and rank of each gradient;
/// `plain` where some gradient is float32, and so are the bases.
#[pyfunction]
pub fn project_workspace(shapes: Vec<(usize, usize, usize)>, plain: bool) -> usize {
    if shapes.iter().copied().all(has_rank) { cuda::project_workspace(&shapes, plain) } else { 0 }
}

/// Bytes of workspace that `refresh_basis` takes on a device, for rows, columns and rank of each
/// gradient.
#[pyfunction]
pub fn refresh_basis_workspace(shapes: Vec<(usize, usize, usize)>) -> usize {
    if shapes.iter().copied().all(has_rank) { cuda::refresh_workspace(&shapes) } else { 0 }
}

/// Bytes of workspace that `project_factors` takes on a device, for tokens, rows, columns and rank of
/// each gradient; `plain` where factors are float32.
#[pyfunction]
pub fn project_factors_workspace(shapes: Vec<(usize, usize, usize, usize)>, plain: bool) -> usize {
    if shapes.iter().copied().all(is_product) {
        cuda::project_factors_workspace(&shapes, plain)
    } else {
        0
    }
}

/// Bytes of workspace that `refresh_basis_factors` takes on a device, for tokens, rows, columns and
/// rank of each gradient.
#[pyfunction]
pub fn refresh_basis_factors_workspace(shapes: Vec<(usize, usize, usize, usize)>) -> usize {
    if shapes.iter().copied().all(is_product) {
        cuda::refresh_factors_workspace(&shapes)
    } else {
        0
    }
}

/// Bytes of workspace that `svd` takes on a device.
#[pyfunction]
pub fn svd_workspace(rows: usize, columns: usize, rank: usize, oversample: usize) -> usize {
    let fits = has_rank((rows, columns, rank));
    if fits { cuda::svd_workspace(rows, columns, rank, oversample) } else { 0 }
}

/// Bytes of workspace that `project_back_requantize` takes on a device, for rows and columns of each
/// weight; dense updates take none.
#[pyfunction]
pub fn project_back_requantize_workspace(
    shapes: Vec<(usize, usize)>,
    bits: u8,
    group_size: usize,
) -> usize {
    let fits = shapes.iter().all(|&(rows, columns)| exists(rows, columns)) && group_size > 0;
    let format = Format { bits, symmetric: false };
    if fits { cuda::requantize_workspace(&shapes, format, group_size) } else { 0 }
}
