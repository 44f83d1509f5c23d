//! Scores and selections on CUDA devices: which kernel, which grid, which arguments.

use super::columns::Pattern;
use super::gradients::Gradients;
use super::matrix::{BINS, SHIFTS};
use super::score::Kind;
use super::threshold::{Below, Histogram, STATE};
use super::{Among, Columns, Scored, Selection};
use crate::cuda::{Args, Module, Pointer, Shape, Stream};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorView, TensorViewMut};

/// Threads of a block.
const THREADS: u32 = 256;
/// Elements of a block of the kernels that work on each element by itself.
const EACH: u64 = 2048;
/// Elements of a block of the kernels that choose among all of them.
pub const SPAN: usize = 8192;
/// Rows of a block of `prune_columns`, a warp for each.
const ROWS: u64 = 8;
/// The most columns of the narrower of its two kernels.
const NARROW: usize = 128;

const fn module(file: &'static str, defines: &'static [&'static str]) -> Module {
    Module { file, defines, lists: false }
}

const fn by_element(file: &'static str) -> [Module; 3] {
    [module(file, &["ELEM=f32"]), module(file, &["ELEM=f16"]), module(file, &["ELEM=bf16"])]
}

const COLUMNS: Module = module("prune_columns.cu", &[]);
const PRUNE: [Module; 3] = by_element("prune.cu");
const MATRIX: [Module; 3] = by_element("prune_matrix.cu");
const GRADIENTS: [Module; 3] = by_element("prune_gradients.cu");

/// Every module of the family with its kernels.
pub fn kernels() -> Vec<(Module, &'static [&'static str])> {
    let single: &[_] = &["score_weights", "select_rows", "select_groups"];
    let matrix: &[_] =
        &["score_histogram", "narrow_threshold", "count_ties", "spread_ties", "select_below"];
    let gradients: &[_] = &["accumulate_gradients"];
    let mut list = Vec::new();
    for (modules, names) in [(PRUNE, single), (MATRIX, matrix), (GRADIENTS, gradients)] {
        list.extend(modules.map(|module| (module, names)));
    }
    list.push((COLUMNS, &["prune_columns", "prune_columns_wide"]));
    list
}

fn of_element(stream: &Stream, modules: [Module; 3], elements: &TensorView) -> Result<Module> {
    match elements.dtype() {
        DType::F32 => Ok(modules[0]),
        DType::F16 => Ok(modules[1]),
        DType::BF16 => Ok(modules[2]),
        dtype => Err(Error::Unsupported { op: stream.op(), device: elements.device(), dtype }),
    }
}

/// The arguments that say what a score is.
fn score(scored: &Scored) -> Args {
    let kind = match scored.kind {
        Kind::Given => 0,
        Kind::Weight => 1,
        Kind::Half => 2,
    };
    Args::new()
        .read(&scored.weight)
        .read_some(scored.scale.as_ref())
        .read_some(scored.grad.as_ref())
        .value(scored.alpha)
        .value::<i32>(kind)
        .value(scored.columns as i64)
}

pub fn score_weights((scored, out): &mut (Scored, TensorViewMut), stream: &Stream) -> Result<()> {
    let module = of_element(stream, PRUNE, &scored.weight)?;
    let numel = scored.weight.numel();
    let args = score(scored).write(out).value(numel as i64);
    let shape = Shape::line((numel as u64).div_ceil(EACH), THREADS);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, "score_weights", shape, args) }
}

pub fn select(args: &mut Selection, stream: &Stream) -> Result<()> {
    let Selection { scored, among, drop, mask, nan } = args;
    let drop = *drop as i64;
    let numel = scored.weight.numel();
    let size = match among {
        Among::Matrix { through, workspace } => {
            let state = Pointer::from(workspace);
            let counts = state.after(STATE);
            let rank = if *through { drop.min(numel as i64 - 1) } else { drop - 1 };
            if numel > 0 && rank >= 0 {
                narrow(stream, scored, state, counts, rank, *through)?;
            }
            return compare(stream, scored, state, counts.after(BINS), mask.into(), nan.into());
        }
        Among::Row => None,
        &mut Among::Columns { size } => Some(size),
    };
    let module = of_element(stream, PRUNE, &scored.weight)?;
    let args = score(scored).write(mask).write(nan);
    if let Some(size) = size {
        let args = args.value(numel as i64).value(size as i64).value(drop);
        let shape = Shape::line((numel as u64).div_ceil(EACH), THREADS);
        // SAFETY: as kernels/README.md lists them; the op has checked them.
        return unsafe { stream.launch(module, "select_groups", shape, args) };
    }
    if u32::try_from(scored.columns).is_err() {
        return Err(Error::Value {
            op: stream.op(),
            name: "weight",
            expected: "at most 2^32 - 1 columns to choose among on a CUDA device".into(),
            got: scored.columns.to_string(),
        });
    }
    let blocks = numel.checked_div(scored.columns).unwrap_or(0);
    let shape = Shape::line(blocks as u64, THREADS);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, "select_rows", shape, args.value(drop)) }
}

fn blocks_of(numel: usize) -> Shape {
    Shape::line(numel.div_ceil(SPAN) as u64, THREADS)
}

fn count(
    stream: &Stream,
    scored: &Scored,
    state: Pointer,
    counts: Pointer,
    shift: usize,
) -> Result<()> {
    let module = of_element(stream, MATRIX, &scored.weight)?;
    let numel = scored.weight.numel();
    let args = score(scored).pointer(state).pointer(counts);
    let args = args.value(numel as i64).value(shift as i32);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, "score_histogram", blocks_of(numel), args) }
}

/// The threshold, digit by digit; state and counts are zeros.
fn narrow(
    stream: &Stream,
    scored: &Scored,
    state: Pointer,
    counts: Pointer,
    rank: i64,
    through: bool,
) -> Result<()> {
    let module = of_element(stream, MATRIX, &scored.weight)?;
    for shift in SHIFTS {
        count(stream, scored, state, counts, shift)?;
        let args = Args::new().pointer(state).pointer(counts);
        let args = args.value(shift as i32).value(rank).flag(through);
        // SAFETY: as kernels/README.md lists them; counts and state lie in the workspace.
        unsafe { stream.launch(module, "narrow_threshold", Shape::line(1, THREADS), args) }?;
    }
    Ok(())
}

/// The mask by a threshold; `ties` is room for a number of each block.
fn compare(
    stream: &Stream,
    scored: &Scored,
    state: Pointer,
    ties: Pointer,
    mask: Pointer,
    nan: Pointer,
) -> Result<()> {
    let module = of_element(stream, MATRIX, &scored.weight)?;
    let numel = scored.weight.numel();
    if numel == 0 {
        return Ok(());
    }
    let shape = blocks_of(numel);
    let args = score(scored).pointer(state).pointer(ties).value(numel as i64);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device,
    // and that the workspace has a number for each block.
    unsafe {
        stream.launch(module, "count_ties", shape, args)?;
        let args = Args::new().pointer(state).pointer(ties).value(shape.grid[0] as i64);
        stream.launch(module, "spread_ties", Shape::line(1, THREADS), args)?;
        let args = score(scored).pointer(state).pointer(ties).pointer(mask).pointer(nan);
        stream.launch(module, "select_below", shape, args.value(numel as i64))
    }
}

pub fn score_histogram(args: &mut Histogram, stream: &Stream) -> Result<()> {
    let Histogram { scored, state, counts, shift } = args;
    count(stream, scored, Pointer::from(&*state), counts.into(), *shift)
}

pub fn select_below(args: &mut Below, stream: &Stream) -> Result<()> {
    let Below { scored, state, mask, nan, workspace } = args;
    compare(stream, scored, state.into(), workspace.into(), mask.into(), nan.into())
}

pub fn accumulate_gradients(args: &mut Gradients, stream: &Stream) -> Result<()> {
    let Gradients { total, part, nonfinite, squared, scale } = args;
    let module = of_element(stream, GRADIENTS, part)?;
    let numel = part.numel();
    let args = Args::new()
        .write(total)
        .read(part)
        .write(nonfinite)
        .value(*scale)
        .flag(*squared)
        .value(numel as i64);
    let shape = Shape::line((numel as u64).div_ceil(EACH), THREADS);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, "accumulate_gradients", shape, args) }
}

pub fn prune_columns(args: &mut Columns, stream: &Stream) -> Result<()> {
    let Columns { factor, weight, mask, errors, loss, pattern } = args;
    let rows = loss.numel();
    let width = factor.shape()[0];
    let (size, drop) = match *pattern {
        Pattern::Given => (0, 0),
        Pattern::Groups { size, drop } => (size, drop),
    };
    let args = Args::new()
        .write(weight)
        .read(factor)
        .write(mask)
        .write(errors)
        .write(loss)
        .value(rows as i64)
        .value(width as i32)
        .value(size as i32)
        .value(drop as i32);
    let kernel = if width <= NARROW { "prune_columns" } else { "prune_columns_wide" };
    let shape = Shape::line((rows as u64).div_ceil(ROWS), THREADS);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(COLUMNS, kernel, shape, args) }
}
