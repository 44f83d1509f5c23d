//! Low-rank subspaces: finding them, projecting into them and back.

mod back;
mod bases;
pub mod cuda;
mod decomposition;
mod orthonormal;
mod projection;
mod range;
mod refresh;
mod workspace;

pub use back::{project_back_add, project_back_requantize};
pub use decomposition::svd;
pub use workspace::{
    project_back_requantize_workspace, project_workspace, refresh_basis_workspace, svd_workspace,
};

use pyo3::prelude::*;

use crate::cpu::product::Matrix;
use crate::cpu::threads::Threads;
use crate::dispatch::dispatch;
use crate::error::{Error, Name, Result};
use crate::quant::one_device;
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, Floats, TensorView, TensorViewMut};
use bases::{Bases, Grids, check_basis};
use decomposition::Svd;
use projection::Projection;

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
        one_device(check, &written, &read)?
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

/// The arguments of a refresh.
pub struct Refresh {
    grads: Vec<TensorView>,
    bases: Vec<TensorViewMut>,
    vectors: Vec<TensorViewMut>,
    outcomes: TensorViewMut,
    workspace: Option<TensorViewMut>,
    warm: Vec<bool>,
    keys: Vec<Key>,
    /// Rows, columns, rank.
    shapes: Vec<(usize, usize, usize)>,
}

/// Finds the projectors of gradients anew.
///
/// `bases` (`[min(m, n), rank]`, float32) and `vectors` (`[min(m, n)]`, the leading direction) are
/// read where `warm` says that they hold an earlier basis, and written. So is a row of `outcomes`
/// (`[gradients, 3]`, float64) for each gradient: a status (0 refreshed, 1 zero gradient, 2 kept
/// because of NaN or infinite values), the cosine of the leading directions before and after, and
/// the share of the squared norm captured. `workspace` (uint8) has the size of
/// `refresh_basis_workspace` on devices.
#[pyfunction]
#[pyo3(signature = (
    grads, bases, vectors, outcomes, warm, seed, tensor_ids, steps, workspace=None
))]
#[allow(clippy::too_many_arguments)]
pub fn refresh_basis(
    py: Python<'_>,
    grads: Vec<Arg>,
    bases: Vec<Arg>,
    vectors: Vec<Arg>,
    outcomes: Arg,
    warm: Vec<bool>,
    seed: u64,
    tensor_ids: Vec<u32>,
    steps: Vec<u32>,
    workspace: Option<Arg>,
) -> PyResult<()> {
    const OP: &str = "refresh_basis";
    let check = Check { op: OP };
    let grads = check.inputs("grads", grads)?;
    let (bases, vectors) = (check.outputs("bases", bases)?, check.outputs("vectors", vectors)?);
    let outcomes = check.output("outcomes", outcomes)?;
    let workspace = check_workspace(check, workspace)?;
    for (name, got) in [
        ("bases", bases.len()),
        ("vectors", vectors.len()),
        ("warm", warm.len()),
        ("tensor_ids", tensor_ids.len()),
        ("steps", steps.len()),
    ] {
        check.length(name, got, "grads", grads.len())?;
    }
    check.dtype("outcomes", &outcomes, DType::F64)?;
    check.shape("outcomes", &outcomes, &[grads.len(), 3])?;
    let mut shapes = Vec::with_capacity(grads.len());
    for (i, grad) in grads.iter().enumerate() {
        check.float(("grads", i), grad)?;
        check.contiguous(("grads", i), grad)?;
        let (rows, columns) = check.matrix(("grads", i), grad)?;
        let rank = check_basis(check, i, &bases[i], rows, columns)?;
        check.dtype(("vectors", i), &vectors[i], DType::F32)?;
        check.shape(("vectors", i), &vectors[i], &[rows.min(columns)])?;
        shapes.push((rows, columns, rank));
    }
    let device = {
        let mut written: Vec<_> = named("bases", &bases).collect();
        written.extend(named("vectors", &vectors));
        written.push(("outcomes".into(), &outcomes));
        written.extend(workspace.iter().map(|view| ("workspace".into(), view)));
        one_device(check, &written, &named("grads", &grads).collect::<Vec<_>>())?
    };
    let key = |(id, step)| Key::new(seed, Stream::Sketch, id, step);
    let keys = tensor_ids.into_iter().zip(steps).map(key).collect();
    let args = Refresh { grads, bases, vectors, outcomes, workspace, warm, keys, shapes };
    dispatch(py, OP, device, args, refresh_on_cpu, cuda::refresh)
}

fn refresh_on_cpu(args: &mut Refresh, threads: Threads) -> Result<()> {
    let Refresh { grads, bases, vectors, outcomes, warm, keys, shapes, .. } = args;
    // SAFETY: contiguous float64 on the CPU, which overlaps nothing.
    let outcomes = unsafe { outcomes.as_mut_slice::<f64>() };
    let rows_of = outcomes.as_chunks_mut::<3>().0;
    for (i, (basis, vector)) in bases.iter_mut().zip(vectors).enumerate() {
        let (rows, columns, _) = shapes[i];
        // SAFETY: contiguous float32 on the CPU; they overlap nothing.
        let (basis, vector) =
            unsafe { (basis.as_mut_slice::<f32>(), vector.as_mut_slice::<f32>()) };
        let mut wide = Vec::new();
        let grad = match floats("refresh_basis", &grads[i])? {
            Floats::F32(grad) => grad,
            narrow => {
                wide.resize(rows * columns, 0.0);
                narrow.widen(0, &mut wide);
                &wide
            }
        };
        let square = refresh::square_norm(threads, grad);
        let a = Matrix::rows(grad, rows, columns);
        let a = if Side::of(rows, columns) == Side::Right { a } else { a.transposed() };
        let outcome = refresh::refresh(threads, a, square, basis, vector, warm[i], keys[i]);
        let refresh::Outcome { status, cosine, energy } = outcome;
        rows_of[i] = [f64::from(status as u8), f64::from(cosine), energy];
    }
    Ok(())
}
