//! Low-rank subspaces: finding them, projecting into them and back.

mod orthonormal;
mod projection;
mod range;
mod refresh;

use pyo3::prelude::*;

use crate::cpu::product::Matrix;
use crate::dispatch::dispatch;
use crate::error::{Error, Name, Result};
use crate::quant::cpu::Rounding;
use crate::quant::grid::Format;
use crate::quant::update::Change;
use crate::quant::{bytes_mut, check_grids};
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, Device, Floats, FloatsMut, TensorView, TensorViewMut};
use projection::{Addition, Factors, Projection, Requantization, Update};

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

fn one_device(
    check: Check,
    written: &[(Name, &TensorViewMut)],
    read: &[(Name, &TensorView)],
) -> Result<Device> {
    crate::quant::one_device(check, written, read)
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
    let mut outs = check.outputs("outs", outs)?;
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
    dispatch(py, OP, device, |threads| {
        let mut items = Vec::with_capacity(outs.len());
        for ((out, (grad, basis)), (rows, columns, rank)) in
            outs.iter_mut().zip(grads.iter().zip(&bases)).zip(shapes)
        {
            // SAFETY: contiguous float32 on the CPU; the outputs overlap nothing.
            let (basis, out) = unsafe { (basis.as_slice(), out.as_mut_slice()) };
            let grad = floats(OP, grad)?;
            items.push(Projection { grad, rows, columns, basis, rank, out });
        }
        projection::project(threads, items);
        Ok(())
    })
}

/// Checks low-rank updates against the shapes of what they update.
fn check_updates(
    check: Check,
    shapes: &[(usize, usize)],
    updates: &[TensorView],
    bases: &[TensorView],
) -> Result<Vec<usize>> {
    check.length("updates", updates.len(), "params", shapes.len())?;
    check.length("bases", bases.len(), "params", shapes.len())?;
    let mut ranks = Vec::with_capacity(shapes.len());
    for (i, ((&(rows, columns), update), basis)) in
        shapes.iter().zip(updates).zip(bases).enumerate()
    {
        let rank = check_basis(check, i, basis, rows, columns)?;
        check.dtype(("updates", i), update, DType::F32)?;
        check.contiguous(("updates", i), update)?;
        check.shape(("updates", i), update, &Side::projected(rows, columns, rank))?;
        ranks.push(rank);
    }
    Ok(ranks)
}

/// `params = params * (1 - decay) + scale * back(update)`, in place, rounded once.
///
/// `decays` and the random numbers' `tensor_ids` and `steps` have an entry for each parameter.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn project_back_add(
    py: Python<'_>,
    params: Vec<Arg>,
    updates: Vec<Arg>,
    bases: Vec<Arg>,
    scale: f64,
    decay: f64,
    stochastic_rounding: bool,
    seed: u64,
    tensor_ids: Vec<u32>,
    steps: Vec<u32>,
) -> PyResult<()> {
    const OP: &str = "project_back_add";
    let check = Check { op: OP };
    let mut params = check.outputs("params", params)?;
    let (updates, bases) = (check.inputs("updates", updates)?, check.inputs("bases", bases)?);
    let mut shapes = Vec::with_capacity(params.len());
    for (i, param) in params.iter().enumerate() {
        check.float(("params", i), param)?;
        shapes.push(check.matrix(("params", i), param)?);
    }
    let ranks = check_updates(check, &shapes, &updates, &bases)?;
    check.length("tensor_ids", tensor_ids.len(), "params", params.len())?;
    check.length("steps", steps.len(), "params", params.len())?;
    let device = {
        let written: Vec<_> = named("params", &params).collect();
        let read: Vec<_> = named("updates", &updates).chain(named("bases", &bases)).collect();
        one_device(check, &written, &read)?
    };
    let change = Change { keep: (1.0 - decay) as f32, alpha: scale as f32 };
    dispatch(py, OP, device, |threads| {
        let mut items = Vec::with_capacity(params.len());
        for (i, param) in params.iter_mut().enumerate() {
            let unsupported = Error::Unsupported { op: OP, device, dtype: param.dtype() };
            // SAFETY: contiguous, on the CPU, of the checked dtypes; parameters overlap nothing.
            let (param, update, basis) =
                unsafe { (FloatsMut::of(param), updates[i].as_slice(), bases[i].as_slice()) };
            let (rows, columns) = shapes[i];
            let factors = Factors::new(rows, columns, update, basis, ranks[i]);
            let key = stochastic_rounding
                .then(|| Key::new(seed, Stream::Bfloat16, tensor_ids[i], steps[i]));
            items.push(Addition { param: param.ok_or(unsupported)?, factors, key });
        }
        projection::project_back_add(threads, items, change);
        Ok(())
    })
}

/// `weights = round(weights * (1 - decay) + scale * back(update))` on quantized weights, in place.
///
/// Where `bases` is empty the updates are dense, `[m, n]`. Groups in which nothing changes keep
/// their codes and grids bit for bit.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn project_back_requantize(
    py: Python<'_>,
    codes: Vec<Arg>,
    scales: Vec<Arg>,
    zero_points: Vec<Arg>,
    shapes: Vec<(usize, usize)>,
    updates: Vec<Arg>,
    bases: Vec<Arg>,
    bits: u8,
    group_size: usize,
    scale: f64,
    decay: f64,
    stochastic: bool,
    seed: u64,
    tensor_ids: Vec<u32>,
    steps: Vec<u32>,
) -> PyResult<()> {
    const OP: &str = "project_back_requantize";
    let check = Check { op: OP };
    let format = Format::new(check, bits, zero_points.is_empty() && !codes.is_empty())?;
    let mut codes = check.outputs("codes", codes)?;
    let mut scales = check.outputs("scales", scales)?;
    let mut zero_points = check.outputs("zero_points", zero_points)?;
    let (updates, bases) = (check.inputs("updates", updates)?, check.inputs("bases", bases)?);
    for (name, got) in [
        ("scales", scales.len()),
        ("shapes", shapes.len()),
        ("updates", updates.len()),
        ("tensor_ids", tensor_ids.len()),
        ("steps", steps.len()),
    ] {
        check.length(name, got, "codes", codes.len())?;
    }
    if !format.symmetric {
        check.length("zero_points", zero_points.len(), "codes", codes.len())?;
    }
    let byte = if format.symmetric && bits == 8 { DType::I8 } else { DType::U8 };
    for (i, &(rows, columns)) in shapes.iter().enumerate() {
        check.dtype(("codes", i), &codes[i], byte)?;
        let numel = rows * columns;
        let stored = if bits == 4 { vec![numel.div_ceil(2)] } else { vec![rows, columns] };
        check.shape(("codes", i), &codes[i], &stored)?;
        let zero_point = zero_points.get(i).map(|t| &**t);
        check_grids(check, &scales[i], zero_point, numel, group_size)?;
    }
    let ranks = if bases.is_empty() {
        for (i, (update, &(rows, columns))) in updates.iter().zip(&shapes).enumerate() {
            check.dtype(("updates", i), update, DType::F32)?;
            check.contiguous(("updates", i), update)?;
            check.shape(("updates", i), update, &[rows, columns])?;
        }
        Vec::new()
    } else {
        check_updates(check, &shapes, &updates, &bases)?
    };
    let device = {
        let mut written: Vec<_> = named("codes", &codes).collect();
        written.extend(named("scales", &scales));
        written.extend(named("zero_points", &zero_points));
        let read: Vec<_> = named("updates", &updates).chain(named("bases", &bases)).collect();
        one_device(check, &written, &read)?
    };
    let change = Change { keep: (1.0 - decay) as f32, alpha: scale as f32 };
    dispatch(py, OP, device, |threads| {
        let mut zero_points = zero_points.iter_mut();
        let mut items = Vec::with_capacity(codes.len());
        for (i, (codes, scale)) in codes.iter_mut().zip(&mut scales).enumerate() {
            let (rows, columns) = shapes[i];
            // SAFETY: contiguous, on the CPU, of the checked dtypes; written tensors overlap
            // nothing.
            let (codes, scale, zero_point, update) = unsafe {
                (
                    bytes_mut(codes),
                    scale.as_mut_slice(),
                    zero_points.next().map(|t| t.as_mut_slice()).unwrap_or_default(),
                    updates[i].as_slice(),
                )
            };
            let update = match bases.get(i) {
                None => Update::Dense(update),
                Some(basis) => {
                    // SAFETY: as above.
                    let basis = unsafe { basis.as_slice() };
                    Update::Factors(Factors::new(rows, columns, update, basis, ranks[i]))
                }
            };
            let key = stochastic.then(|| Key::new(seed, Stream::Quantize, tensor_ids[i], steps[i]));
            let rounding = Rounding { format, group_size, key };
            let numel = rows * columns;
            items.push(Requantization { codes, scale, zero_point, numel, update, rounding });
        }
        projection::project_back_requantize(threads, items, change);
        Ok(())
    })
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
    let (mut bases, mut vectors) =
        (check.outputs("bases", bases)?, check.outputs("vectors", vectors)?);
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
    dispatch(py, OP, device, |threads| {
        let mut outcomes = Vec::with_capacity(grads.len());
        for (i, (basis, vector)) in bases.iter_mut().zip(&mut vectors).enumerate() {
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
    })
}

/// Randomized SVD of `x` (`[m, n]`): writes `u` (`[m, rank]`), `s` (`[rank]`) and `vh`
/// (`[rank, n]`), float32. Returns whether `x` was finite; nothing is written otherwise.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn svd(
    py: Python<'_>,
    x: Arg,
    u: Arg,
    s: Arg,
    vh: Arg,
    n_iter: usize,
    oversample: usize,
    seed: u64,
) -> PyResult<bool> {
    const OP: &str = "svd";
    let check = Check { op: OP };
    let x = check.input("x", x)?;
    let (mut u, mut s, mut vh) =
        (check.output("u", u)?, check.output("s", s)?, check.output("vh", vh)?);
    check.float("x", &x)?;
    check.contiguous("x", &x)?;
    let (rows, columns) = check.matrix("x", &x)?;
    let rank = s.numel();
    let short = rows.min(columns);
    check.value("rank", rank >= 1 && rank <= short, format!("from 1 to {short}"), rank)?;
    for (name, t, shape) in
        [("u", &u, vec![rows, rank]), ("s", &s, vec![rank]), ("vh", &vh, vec![rank, columns])]
    {
        check.dtype(name, t, DType::F32)?;
        check.shape(name, t, &shape)?;
    }
    let written = [("u".into(), &u), ("s".into(), &s), ("vh".into(), &vh)];
    let device = one_device(check, &written, &[("x".into(), &x)])?;
    dispatch(py, OP, device, |threads| {
        let mut values = vec![0f32; x.numel()];
        floats(OP, &x)?.widen(0, &mut values);
        let largest = values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            return Ok(false);
        }
        // A power of two, so that neither squares nor this division lose anything.
        let exponent = if largest > 0.0 { largest.log2().floor() as i32 } else { 0 };
        let unit = 2f64.powi(exponent);
        values.iter_mut().for_each(|v| *v = (f64::from(*v) / unit) as f32);
        // SAFETY: contiguous float32 on the CPU; they overlap nothing.
        let (u, s, vh) =
            unsafe { (u.as_mut_slice::<f32>(), s.as_mut_slice::<f32>(), vh.as_mut_slice::<f32>()) };
        let side = Side::of(rows, columns);
        let a = Matrix::rows(&values, rows, columns);
        let a = if side == Side::Right { a } else { a.transposed() };
        let key = Key::new(seed, Stream::Sketch, 0, 0);
        let width = (rank + oversample).min(short);
        let failed =
            || Error::Runtime { op: OP, what: "no orthonormal basis could be found".into() };
        let subspace = range::cold(threads, a, width, n_iter, key).ok_or_else(failed)?;
        let (squares, right, images) = range::rotate(threads, a, &subspace).ok_or_else(failed)?;
        let left = range::left_vectors(threads, images, width, key).ok_or_else(failed)?;
        for (s, square) in s.iter_mut().zip(squares) {
            *s = (square.max(0.0).sqrt() * unit) as f32;
        }
        let (u_from, v_from) = if side == Side::Right { (&left, &right) } else { (&right, &left) };
        for (to, from) in u.chunks_mut(rank).zip(u_from.chunks(width)) {
            to.copy_from_slice(&from[..rank]);
        }
        for (j, row) in v_from.chunks(width).enumerate() {
            for (i, &value) in row[..rank].iter().enumerate() {
                vh[i * columns + j] = value;
            }
        }
        Ok(true)
    })
}
