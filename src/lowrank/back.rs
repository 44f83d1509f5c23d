//! From a subspace back into weights: float ones, and quantized ones in one pass.

use pyo3::prelude::*;

use super::bases::{Bases, Grids};
use super::projection::{self, Addition, Factors, Requantization, Update};
use super::{Side, check_workspace, cuda, named};
use crate::cpu::threads::Threads;
use crate::dispatch::dispatch;
use crate::error::{Error, Result};
use crate::quant::cpu::Rounding;
use crate::quant::grid::Format;
use crate::quant::update::Change;
use crate::quant::{bytes_mut, check_grids};
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, FloatsMut, TensorView, TensorViewMut};

/// Checks low-rank updates against the shapes of what they update.
fn check_updates(
    check: Check,
    shapes: &[(usize, usize)],
    updates: &[TensorView],
    bases: &Bases,
) -> Result<Vec<usize>> {
    check.length("updates", updates.len(), "params", shapes.len())?;
    check.length("bases", bases.len(), "params", shapes.len())?;
    let mut ranks = Vec::with_capacity(shapes.len());
    for (i, (&(rows, columns), update)) in shapes.iter().zip(updates).enumerate() {
        let rank = bases.rank(check, i, rows, columns, (("updates", i).into(), update))?;
        check.dtype(("updates", i), update, DType::F32)?;
        check.contiguous(("updates", i), update)?;
        check.shape(("updates", i), update, &Side::projected(rows, columns, rank))?;
        ranks.push(rank);
    }
    Ok(ranks)
}

/// The flag of a gradient scaler: one float32; where it is not zero nothing is written.
fn check_flag(check: Check, found_inf: Option<Arg>) -> Result<Option<TensorView>> {
    let flag = found_inf.map(|arg| check.input("found_inf", arg)).transpose()?;
    flag.iter().try_for_each(|flag| check.scalar("found_inf", flag, DType::F32))?;
    Ok(flag)
}

fn is_set(flag: Option<&TensorView>) -> bool {
    // SAFETY: one float32 on the CPU, as checked.
    flag.is_some_and(|flag| unsafe { flag.as_slice::<f32>()[0] != 0.0 })
}

/// The arguments of a call on float parameters.
pub struct Additions {
    pub params: Vec<TensorViewMut>,
    pub updates: Vec<TensorView>,
    pub bases: Bases,
    pub found_inf: Option<TensorView>,
    pub shapes: Vec<(usize, usize)>,
    pub ranks: Vec<usize>,
    pub keys: Option<Vec<Key>>,
    pub change: Change,
}

/// The arguments of a call on quantized weights.
pub struct Requantizations {
    pub codes: Vec<TensorViewMut>,
    pub scales: Vec<TensorViewMut>,
    pub zero_points: Vec<TensorViewMut>,
    pub updates: Vec<TensorView>,
    /// None for dense updates.
    pub bases: Bases,
    pub found_inf: Option<TensorView>,
    pub workspace: Option<TensorViewMut>,
    pub shapes: Vec<(usize, usize)>,
    pub ranks: Vec<usize>,
    pub format: Format,
    pub group_size: usize,
    pub stochastic: bool,
    pub keys: Vec<Key>,
    pub change: Change,
}

/// `params = params * (1 - decay) + scale * back(update)`, in place, rounded once.
///
/// The random numbers' `tensor_ids` and `steps` have an entry for each parameter. Where `found_inf`
/// (one float32) is given and not zero, nothing is written. Bases are those of `project`.
#[pyfunction]
#[pyo3(signature = (
    params, updates, bases, scale, decay, stochastic_rounding, seed, tensor_ids, steps,
    found_inf=None, basis_grids=None
))]
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
    found_inf: Option<Arg>,
    basis_grids: Option<Grids>,
) -> PyResult<()> {
    const OP: &str = "project_back_add";
    let check = Check { op: OP };
    let params = check.outputs("params", params)?;
    let found_inf = check_flag(check, found_inf)?;
    let updates = check.inputs("updates", updates)?;
    let bases = Bases::new(check, bases, basis_grids)?;
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
        let mut read: Vec<_> = named("updates", &updates).chain(bases.named()).collect();
        read.extend(found_inf.iter().map(|flag| ("found_inf".into(), flag)));
        check.one_device(&written, &read)?
    };
    let key = |(id, step)| Key::new(seed, Stream::Bfloat16, id, step);
    let keys = stochastic_rounding.then(|| tensor_ids.into_iter().zip(steps).map(key).collect());
    let change = Change { keep: (1.0 - decay) as f32, alpha: scale as f32 };
    let args = Additions { params, updates, bases, found_inf, shapes, ranks, keys, change };
    let cpu = |args: &mut Additions, threads| {
        let Additions { params, updates, bases, found_inf, shapes, ranks, keys, change } = args;
        if is_set(found_inf.as_ref()) {
            return Ok(());
        }
        let mut numbers = Vec::with_capacity(params.len());
        for (i, &(rows, columns)) in shapes.iter().enumerate() {
            // SAFETY: on the CPU, and nothing writes to them.
            numbers.push(unsafe { bases.numbers(threads, i, rows.min(columns), ranks[i]) });
        }
        let mut items = Vec::with_capacity(params.len());
        for (i, param) in params.iter_mut().enumerate() {
            let unsupported = Error::Unsupported { op: OP, device, dtype: param.dtype() };
            // SAFETY: contiguous, on the CPU, of the checked dtypes; parameters overlap nothing.
            let (param, update) = unsafe { (FloatsMut::of(param), updates[i].as_slice()) };
            let (rows, columns) = shapes[i];
            let factors = Factors::new(rows, columns, update, &numbers[i], ranks[i]);
            let key = keys.as_ref().map(|keys| keys[i]);
            items.push(Addition { param: param.ok_or(unsupported)?, factors, key });
        }
        projection::project_back_add(threads, items, *change);
        Ok(())
    };
    dispatch(py, OP, device, args, cpu, cuda::add)
}

/// `weights = round(weights * (1 - decay) + scale * back(update))` on quantized weights, in place.
///
/// Where `bases` is empty the updates are dense, `[m, n]`. Groups in which nothing changes keep
/// their codes and grids bit for bit; where `found_inf` (one float32) is given and not zero, all do.
/// Bases are those of `project`; `workspace` (uint8) has the size of
/// `project_back_requantize_workspace` on devices.
#[pyfunction]
#[pyo3(signature = (
    codes, scales, zero_points, shapes, updates, bases, bits, group_size, scale, decay, stochastic,
    seed, tensor_ids, steps, found_inf=None, basis_grids=None, workspace=None
))]
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
    found_inf: Option<Arg>,
    basis_grids: Option<Grids>,
    workspace: Option<Arg>,
) -> PyResult<()> {
    const OP: &str = "project_back_requantize";
    let check = Check { op: OP };
    let format = Format::new(check, bits, zero_points.is_empty() && !codes.is_empty())?;
    let codes = check.outputs("codes", codes)?;
    let scales = check.outputs("scales", scales)?;
    let zero_points = check.outputs("zero_points", zero_points)?;
    let found_inf = check_flag(check, found_inf)?;
    let workspace = check_workspace(check, workspace)?;
    let updates = check.inputs("updates", updates)?;
    let bases = Bases::new(check, bases, basis_grids)?;
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
        written.extend(workspace.iter().map(|view| ("workspace".into(), view)));
        let mut read: Vec<_> = named("updates", &updates).chain(bases.named()).collect();
        read.extend(found_inf.iter().map(|flag| ("found_inf".into(), flag)));
        check.one_device(&written, &read)?
    };
    let key = |(id, step)| Key::new(seed, Stream::Quantize, id, step);
    let args = Requantizations {
        codes,
        scales,
        zero_points,
        updates,
        bases,
        found_inf,
        workspace,
        shapes,
        ranks,
        format,
        group_size,
        stochastic,
        keys: tensor_ids.into_iter().zip(steps).map(key).collect(),
        change: Change { keep: (1.0 - decay) as f32, alpha: scale as f32 },
    };
    dispatch(py, OP, device, args, requantize, cuda::requantize)
}

fn requantize(args: &mut Requantizations, threads: Threads) -> Result<()> {
    if is_set(args.found_inf.as_ref()) {
        return Ok(());
    }
    let mut numbers = Vec::with_capacity(args.ranks.len());
    for (i, (&(rows, columns), &rank)) in args.shapes.iter().zip(&args.ranks).enumerate() {
        // SAFETY: on the CPU, and nothing writes to them.
        numbers.push(unsafe { args.bases.numbers(threads, i, rows.min(columns), rank) });
    }
    let mut zero_points = args.zero_points.iter_mut();
    let mut items = Vec::with_capacity(args.codes.len());
    for (i, (codes, scale)) in args.codes.iter_mut().zip(&mut args.scales).enumerate() {
        let (rows, columns) = args.shapes[i];
        // SAFETY: contiguous, on the CPU, of the checked dtypes; written tensors overlap nothing.
        let (codes, scale, zero_point, update) = unsafe {
            (
                bytes_mut(codes),
                scale.as_mut_slice(),
                zero_points.next().map(|t| t.as_mut_slice()).unwrap_or_default(),
                args.updates[i].as_slice(),
            )
        };
        let update = match numbers.get(i) {
            None => Update::Dense(update),
            Some(basis) => {
                Update::Factors(Factors::new(rows, columns, update, basis, args.ranks[i]))
            }
        };
        let key = args.stochastic.then(|| args.keys[i]);
        let rounding = Rounding { format: args.format, group_size: args.group_size, key };
        let numel = rows * columns;
        items.push(Requantization { codes, scale, zero_point, numel, update, rounding });
    }
    projection::project_back_requantize(threads, items, args.change);
    Ok(())
}
