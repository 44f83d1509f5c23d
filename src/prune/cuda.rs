//! Scores and selections on CUDA devices: which kernel, which grid, which arguments.

use super::columns::Pattern;
use super::score::Kind;
use super::{Among, Columns, Scored, Selection};
use crate::cuda::{Args, Module, Shape, Stream};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorViewMut};

/// Threads of a block.
const THREADS: u32 = 256;
/// Elements of a block of the kernels that work on each element by itself.
const EACH: u64 = 2048;
/// Rows of a block of `prune_columns`, a warp for each.
const ROWS: u64 = 8;
/// The most columns of the narrower of its two kernels.
const NARROW: usize = 128;

const fn module(defines: &'static [&'static str]) -> Module {
    Module { file: "prune.cu", defines, lists: false }
}

const COLUMNS: Module = Module { file: "prune_columns.cu", defines: &[], lists: false };
const PRUNE: [Module; 3] = [module(&["ELEM=f32"]), module(&["ELEM=f16"]), module(&["ELEM=bf16"])];

/// Every module of the family with its kernels.
pub fn kernels() -> Vec<(Module, &'static [&'static str])> {
    let names: &[_] = &["score_weights", "select_rows", "select_groups"];
    let mut list: Vec<_> = PRUNE.into_iter().map(|module| (module, names)).collect();
    list.push((COLUMNS, &["prune_columns", "prune_columns_wide"]));
    list
}

fn of_element(stream: &Stream, scored: &Scored) -> Result<Module> {
    match scored.weight.dtype() {
        DType::F32 => Ok(PRUNE[0]),
        DType::F16 => Ok(PRUNE[1]),
        DType::BF16 => Ok(PRUNE[2]),
        dtype => Err(Error::Unsupported { op: stream.op(), device: scored.weight.device(), dtype }),
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
    let module = of_element(stream, scored)?;
    let numel = scored.weight.numel();
    let args = score(scored).write(out).value(numel as i64);
    let shape = Shape::line((numel as u64).div_ceil(EACH), THREADS);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, "score_weights", shape, args) }
}

pub fn select(args: &mut Selection, stream: &Stream) -> Result<()> {
    let Selection { scored, among, drop, mask, nan } = args;
    let module = of_element(stream, scored)?;
    let numel = scored.weight.numel();
    let args = score(scored).write(mask).write(nan);
    let (span, through) = match *among {
        Among::Columns { size } => {
            let args = args.value(numel as i64).value(size as i64).value(*drop as i64);
            let shape = Shape::line((numel as u64).div_ceil(EACH), THREADS);
            // SAFETY: as kernels/README.md lists them; the op has checked them.
            return unsafe { stream.launch(module, "select_groups", shape, args) };
        }
        Among::Row => (scored.columns, false),
        Among::Matrix { through } => (numel, through),
    };
    if u32::try_from(span).is_err() {
        return Err(Error::Value {
            op: stream.op(),
            name: "weight",
            expected: "at most 2^32 - 1 weights to choose among on a CUDA device".into(),
            got: span.to_string(),
        });
    }
    let args = args.value(span as i64).value(*drop as i64).flag(through);
    let blocks = numel.checked_div(span).unwrap_or(0);
    // SAFETY: as kernels/README.md lists them; the op has checked dtypes, shapes and the device.
    unsafe { stream.launch(module, "select_rows", Shape::line(blocks as u64, THREADS), args) }
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
