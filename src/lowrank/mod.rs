//! Low-rank subspaces: finding them, projecting into them and back.

mod back;
mod decomposition;
mod orthonormal;
mod projection;
mod range;
mod refresh;

pub use back::{project_back_add, project_back_requantize};
pub use decomposition::svd;

use pyo3::prelude::*;

use crate::cpu::product::Matrix;
use crate::dispatch::{dispatch, no_kernel};
use crate::error::{Error, Name, Result};
use crate::quant::one_device;
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, Floats, TensorView, TensorViewMut};
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

/// The rank of basis `i`, which must be `[min(rows, columns), rank]` in float32.
fn check_basis(
    check: Check,
    i: usize,
    basis: &TensorView,
    rows: usize,
    columns: usize,
) -> Result<usize> {
    let name = ("bases", i);
    check.dtype(name, basis, DType::F32)?;
    check.contiguous(name, basis)?;
    let (_, rank) = check.matrix(name, basis)?;
    let short = rows.min(columns);
    check.shape(name, basis, &[short, rank])?;
    check.value("rank", rank >= 1 && rank <= short, format!("from 1 to {short}"), rank)?;
    Ok(rank)
}

fn floats<'a>(op: &'static str, view: &'a TensorView) -> Result<Floats<'a>> {
    // SAFETY: callers hand over contiguous views on the CPU that nothing writes to.
    let floats = unsafe { Floats::of(view) };
    floats.ok_or(Error::Unsupported { op, device: view.device(), dtype: view.dtype() })
}

/// Projects gradients (`[m, n]`) with bases (`[min(m, n), rank]`, float32) into `outs` (float32).
///
/// For m >= n an output is `grad @ basis`, `[m, rank]`; otherwise `basis.T @ grad`, `[rank, n]`.
#[pyfunction]
pub fn project(py: Python<'_>, grads: Vec<Arg>, bases: Vec<Arg>, outs: Vec<Arg>) -> PyResult<()> {
    const OP: &str = "project";
    let check = Check { op: OP };
    let (grads, bases) = (check.inputs("grads", grads)?, check.inputs("bases", bases)?);
    let outs = check.outputs("outs", outs)?;
    check.length("bases", bases.len(), "grads", grads.len())?;
    check.length("outs", outs.len(), "grads", grads.len())?;
    let mut shapes = Vec::with_capacity(grads.len());
    for (i, ((grad, basis), out)) in grads.iter().zip(&bases).zip(&outs).enumerate() {
        check.float(("grads", i), grad)?;
        check.contiguous(("grads", i), grad)?;
        let (rows, columns) = check.matrix(("grads", i), grad)?;
        let rank = check_basis(check, i, basis, rows, columns)?;
        check.dtype(("outs", i), out, DType::F32)?;
        check.shape(("outs", i), out, &Side::projected(rows, columns, rank))?;
        shapes.push((rows, columns, rank));
    }
    let device = {
        let written: Vec<_> = named("outs", &outs).collect();
        let read: Vec<_> = named("grads", &grads).chain(named("bases", &bases)).collect();
        one_device(check, &written, &read)?
    };
    type Views = (Vec<TensorView>, Vec<TensorView>, Vec<TensorViewMut>);
    let cpu = |(grads, bases, outs): &mut Views, threads| {
        let mut items = Vec::with_capacity(outs.len());
        for ((out, (grad, basis)), (rows, columns, rank)) in
            outs.iter_mut().zip(grads.iter().zip(&*bases)).zip(shapes)
        {
            // SAFETY: contiguous float32 on the CPU; the outputs overlap nothing.
            let (basis, out) = unsafe { (basis.as_slice(), out.as_mut_slice()) };
            let grad = floats(OP, grad)?;
            items.push(Projection { grad, rows, columns, basis, rank, out });
        }
        projection::project(threads, items);
        Ok(())
    };
    dispatch(py, OP, device, (grads, bases, outs), cpu, no_kernel)
}

/// Finds the projectors of gradients anew.
///
/// `bases` (`[min(m, n), rank]`, float32) and `vectors` (`[min(m, n)]`, the leading direction) are
/// read where `warm` says that they hold an earlier basis, and written. Returns for each gradient
/// a status (0 refreshed, 1 zero gradient, 2 kept because of NaN or infinite values), the cosine
/// of the leading directions before and after, and the share of the squared norm captured.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn refresh_basis(
    py: Python<'_>,
    grads: Vec<Arg>,
    bases: Vec<Arg>,
    vectors: Vec<Arg>,
    warm: Vec<bool>,
    seed: u64,
    tensor_ids: Vec<u32>,
    steps: Vec<u32>,
) -> PyResult<Vec<(u8, f32, f64)>> {
    const OP: &str = "refresh_basis";
    let check = Check { op: OP };
    let grads = check.inputs("grads", grads)?;
    let (bases, vectors) = (check.outputs("bases", bases)?, check.outputs("vectors", vectors)?);
    for (name, got) in [
        ("bases", bases.len()),
        ("vectors", vectors.len()),
        ("warm", warm.len()),
        ("tensor_ids", tensor_ids.len()),
        ("steps", steps.len()),
    ] {
        check.length(name, got, "grads", grads.len())?;
    }
    let mut shapes = Vec::with_capacity(grads.len());
    for (i, grad) in grads.iter().enumerate() {
        check.float(("grads", i), grad)?;
        check.contiguous(("grads", i), grad)?;
        let (rows, columns) = check.matrix(("grads", i), grad)?;
        check_basis(check, i, &bases[i], rows, columns)?;
        check.dtype(("vectors", i), &vectors[i], DType::F32)?;
        check.shape(("vectors", i), &vectors[i], &[rows.min(columns)])?;
        shapes.push((rows, columns));
    }
    let device = {
        let mut written: Vec<_> = named("bases", &bases).collect();
        written.extend(named("vectors", &vectors));
        one_device(check, &written, &named("grads", &grads).collect::<Vec<_>>())?
    };
    type Views = (Vec<TensorView>, Vec<TensorViewMut>, Vec<TensorViewMut>);
    let cpu = |(grads, bases, vectors): &mut Views, threads| {
        let mut outcomes = Vec::with_capacity(grads.len());
        for (i, (basis, vector)) in bases.iter_mut().zip(vectors).enumerate() {
            let (rows, columns) = shapes[i];
            // SAFETY: contiguous float32 on the CPU; they overlap nothing.
            let (basis, vector) =
                unsafe { (basis.as_mut_slice::<f32>(), vector.as_mut_slice::<f32>()) };
            let mut wide = Vec::new();
            let grad = match floats(OP, &grads[i])? {
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
            let key = Key::new(seed, Stream::Sketch, tensor_ids[i], steps[i]);
            let outcome = refresh::refresh(threads, a, square, basis, vector, warm[i], key);
            outcomes.push((outcome.status as u8, outcome.cosine, outcome.energy));
        }
        Ok(outcomes)
    };
    dispatch(py, OP, device, (grads, bases, vectors), cpu, no_kernel)
}
