//! Low-rank subspaces: finding them, projecting into them and back.

mod back;
mod bases;
pub mod cuda;
mod decomposition;
mod factors;
mod orthonormal;
mod projection;
mod range;
mod refresh;
mod search;
mod source;
mod workspace;

pub use back::{project_back_add, project_back_requantize};
pub use decomposition::svd;
pub use factors::project_factors;
pub use search::{refresh_basis, refresh_basis_factors};
pub use workspace::{
    project_back_requantize_workspace, project_factors_workspace, project_workspace,
    refresh_basis_factors_workspace, refresh_basis_workspace, svd_workspace,
};

use pyo3::prelude::*;

use crate::dispatch::dispatch;
use crate::error::{Error, Name, Result};
use crate::tensor::{Arg, Check, DType, Floats, TensorView, TensorViewMut};
use bases::{Bases, Grids};
use decomposition::Svd;
use projection::Projection;
use search::Refresh;

/// On which side of the gradient the projector stands: that of the shorter dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

impl Side {
    fn of(rows: usize, columns: usize) -> Self {
        if rows >= columns { Self::Right } else { Self::Left }
    }

    /// The shape of a projected gradient.
    fn projected(rows: usize, columns: usize, rank: usize) -> [usize; 2] {
        match Self::of(rows, columns) {
            Self::Right => [rows, rank],
            Self::Left => [rank, columns],
        }
    }
}

fn named<'a, T>(name: &'static str, views: &'a [T]) -> impl Iterator<Item = (Name, &'a T)> {
    views.iter().enumerate().map(move |(i, view)| (Name::from((name, i)), view))
}

/// Memory for intermediate results on devices: bytes, of any content.
fn check_workspace(check: Check, workspace: Option<Arg>) -> Result<Option<TensorViewMut>> {
    let workspace = workspace.map(|arg| check.output("workspace", arg)).transpose()?;
    workspace.iter().try_for_each(|workspace| check.dtype("workspace", workspace, DType::U8))?;
    Ok(workspace)
}

fn floats<'a>(op: &'static str, view: &'a TensorView) -> Result<Floats<'a>> {
    // SAFETY: callers hand over contiguous views on the CPU that nothing writes to.
    let floats = unsafe { Floats::of(view) };
    floats.ok_or(Error::Unsupported { op, device: view.device(), dtype: view.dtype() })
}

/// The arguments of a projection.
pub struct Project {
    grads: Vec<TensorView>,
    bases: Bases,
    outs: Vec<TensorViewMut>,
    workspace: Option<TensorViewMut>,
    /// Rows, columns, rank.
    shapes: Vec<(usize, usize, usize)>,
}

/// Projects gradients (`[m, n]`) with bases (`[min(m, n), rank]`) into `outs` (float32).
///
/// For m >= n an output is `grad @ basis`, `[m, rank]`; otherwise `basis.T @ grad`, `[rank, n]`.
/// Bases are float32; or, with `basis_grids` (scales, zero points, bits, group size), codes of
/// `quantize_blockwise`.
/// `workspace` (uint8) has the size of `project_workspace` on devices.
#[pyfunction]
#[pyo3(signature = (grads, bases, outs, basis_grids=None, workspace=None))]
pub fn project(
    py: Python<'_>,
    grads: Vec<Arg>,
    bases: Vec<Arg>,
    outs: Vec<Arg>,
    basis_grids: Option<Grids>,
    workspace: Option<Arg>,
) -> PyResult<()> {
    const OP: &str = "project";
    let check = Check { op: OP };
    let grads = check.inputs("grads", grads)?;
    let bases = Bases::new(check, bases, basis_grids)?;
    let outs = check.outputs("outs", outs)?;
    let workspace = check_workspace(check, workspace)?;
    check.length("bases", bases.len(), "grads", grads.len())?;
    check.length("outs", outs.len(), "grads", grads.len())?;
    let mut shapes = Vec::with_capacity(grads.len());
    for (i, (grad, out)) in grads.iter().zip(&outs).enumerate() {
        check.float(("grads", i), grad)?;
        check.contiguous(("grads", i), grad)?;
        let (rows, columns) = check.matrix(("grads", i), grad)?;
        let rank = bases.rank(check, i, rows, columns, (("outs", i).into(), out))?;
        check.dtype(("outs", i), out, DType::F32)?;
        check.shape(("outs", i), out, &Side::projected(rows, columns, rank))?;
        shapes.push((rows, columns, rank));
    }
    let device = {
        let mut written: Vec<_> = named("outs", &outs).collect();
        written.extend(workspace.iter().map(|view| ("workspace".into(), view)));
        let read: Vec<_> = named("grads", &grads).chain(bases.named()).collect();
        check.one_device(&written, &read)?
    };
    let cpu = |args: &mut Project, threads| {
        let Project { grads, bases, outs, shapes, .. } = args;
        let mut numbers = Vec::with_capacity(outs.len());
        for (i, &(rows, columns, rank)) in shapes.iter().enumerate() {
            // SAFETY: on the CPU, and nothing writes to them.
            numbers.push(unsafe { bases.numbers(threads, i, rows.min(columns), rank) });
        }
        let mut items = Vec::with_capacity(outs.len());
        for (i, (grad, out)) in grads.iter().zip(outs).enumerate() {
            let (rows, columns, rank) = shapes[i];
            // SAFETY: contiguous float32 on the CPU; the outputs overlap nothing.
            let out = unsafe { out.as_mut_slice() };
            let (grad, basis) = (floats(OP, grad)?, &*numbers[i]);
            items.push(Projection { grad, rows, columns, basis, rank, out });
        }
        projection::project(threads, items);
        Ok(())
    };
    let args = Project { grads, bases, outs, workspace, shapes };
    dispatch(py, OP, device, args, cpu, cuda::project)
}
