//! The dynamic maps of optimizer states as operations on whole tensors.

use pyo3::prelude::*;

use super::dynamic::codec::Codec;
use super::grid::sanitize;
use super::{count, counter, cuda};
use crate::cpu::threads::Threads;
use crate::dispatch::dispatch;
use crate::error::Result;
use crate::match_float;
use crate::tensor::{Arg, Check, DType, Float, TensorView, TensorViewMut};

/// Elements of one task.
const TASK: usize = 1 << 15;

fn check_blocks(
    check: Check,
    codes: &TensorView,
    scale: &TensorView,
    values: &TensorView,
    codec: Codec,
    block_size: usize,
) -> Result<()> {
    Codec::check(check, codec.bits, block_size)?;
    check.dtype("codes", codes, DType::U8)?;
    if codec.bits == 8 {
        check.shape("codes", codes, values.shape())?;
    } else {
        check.shape("codes", codes, &[codec.stored(values.numel())])?;
    }
    check.dtype("scale", scale, DType::F32)?;
    check.shape("scale", scale, &[values.numel().div_ceil(block_size)])
}

/// Encodes a run of whole blocks; returns the number of values not finite.
fn encode_run<T: Float>(
    x: &[T],
    codes: &mut [u8],
    scale: &mut [f32],
    codec: Codec,
    block_size: usize,
) -> usize {
    let (mut values, mut scratch, mut replaced) = (Vec::new(), Vec::new(), 0);
    let blocks = x.chunks(block_size).zip(codes.chunks_mut(codec.stored(block_size)));
    for ((x, codes), scale) in blocks.zip(scale) {
        values.resize(x.len(), 0.0);
        T::widen(x, &mut values);
        if !values.iter().fold(true, |finite, value| finite & value.is_finite()) {
            replaced += sanitize(&mut values);
        }
        *scale = codec.encode(&values, codes, &mut scratch);
    }
    replaced
}

fn encode<T: Float>(
    threads: Threads,
    x: &[T],
    codes: &mut [u8],
    scale: &mut [f32],
    codec: Codec,
    block_size: usize,
) -> usize {
    let blocks = (TASK / block_size).max(1);
    let run = blocks * block_size;
    let tasks = x.chunks(run).zip(codes.chunks_mut(codec.stored(run)));
    let tasks: Vec<_> = tasks.zip(scale.chunks_mut(blocks)).collect();
    threads
        .map(x.len(), tasks, |((x, codes), scale)| encode_run(x, codes, scale, codec, block_size))
        .into_iter()
        .sum()
}

/// The arguments of one quantization.
pub struct DynamicQuantization {
    pub x: TensorView,
    pub codes: TensorViewMut,
    pub scale: TensorViewMut,
    pub nonfinite: TensorViewMut,
    pub codec: Codec,
    pub block_size: usize,
}

/// Quantizes `x` with the map of first moments (`signed`) or of second moments, of 8 or 4 bits.
///
/// `scale` is the largest magnitude of each block; codes of 4 bits are packed. `nonfinite` (int64)
/// is increased by the number of values not finite, which count as zero (NaN) and as the extremes
/// of the block's finite values.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn quantize_dynamic(
    py: Python<'_>,
    x: Arg,
    codes: Arg,
    scale: Arg,
    nonfinite: Arg,
    signed: bool,
    bits: u8,
    block_size: usize,
) -> PyResult<()> {
    const OP: &str = "quantize_dynamic";
    let check = Check { op: OP };
    let codec = Codec { bits, signed };
    let x = check.input("x", x)?;
    let (codes, scale) = (check.output("codes", codes)?, check.output("scale", scale)?);
    let nonfinite = counter(check, nonfinite)?;
    check.float("x", &x)?;
    check.contiguous("x", &x)?;
    check_blocks(check, &codes, &scale, &x, codec, block_size)?;
    let written =
        [("codes".into(), &codes), ("scale".into(), &scale), ("nonfinite".into(), &nonfinite)];
    let device = check.one_device(&written, &[("x".into(), &x)])?;
    let args = DynamicQuantization { x, codes, scale, nonfinite, codec, block_size };
    let cpu = |args: &mut DynamicQuantization, threads| {
        let DynamicQuantization { x, codes, scale, nonfinite, codec, block_size } = args;
        // SAFETY: contiguous, on the CPU, of these dtypes, and disjoint: checked above.
        let (codes, scale) = unsafe { (codes.as_mut_slice(), scale.as_mut_slice()) };
        let replaced = match_float!(x, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            let x = unsafe { x.as_slice::<T>() };
            Ok(encode(threads, x, codes, scale, *codec, *block_size))
        })?;
        // SAFETY: as the others.
        unsafe { count(nonfinite, replaced) };
        Ok(())
    };
    dispatch(py, OP, device, args, cpu, cuda::quantize_dynamic)
}

/// The arguments of one dequantization.
pub struct DynamicDequantization {
    pub codes: TensorView,
    pub scale: TensorView,
    pub out: TensorViewMut,
    pub codec: Codec,
    pub block_size: usize,
}

/// Writes the values behind dynamic codes into `out`.
#[pyfunction]
pub fn dequantize_dynamic(
    py: Python<'_>,
    codes: Arg,
    scale: Arg,
    out: Arg,
    signed: bool,
    bits: u8,
    block_size: usize,
) -> PyResult<()> {
    const OP: &str = "dequantize_dynamic";
    let check = Check { op: OP };
    let codec = Codec { bits, signed };
    let (codes, scale) = (check.input("codes", codes)?, check.input("scale", scale)?);
    let out = check.output("out", out)?;
    check.dtype("out", &out, DType::F32)?;
    check_blocks(check, &codes, &scale, &out, codec, block_size)?;
    check.contiguous("codes", &codes)?;
    check.contiguous("scale", &scale)?;
    let read = [("codes".into(), &codes), ("scale".into(), &scale)];
    let device = check.one_device(&[("out".into(), &out)], &read)?;
    let args = DynamicDequantization { codes, scale, out, codec, block_size };
    dispatch(py, OP, device, args, decode, cuda::dequantize_dynamic)
}

fn decode(args: &mut DynamicDequantization, threads: Threads) -> Result<()> {
    let DynamicDequantization { codes, scale, out, codec, block_size } = args;
    let (codec, block_size) = (*codec, *block_size);
    // SAFETY: contiguous, on the CPU, of these dtypes, and disjoint: checked by the op.
    let (codes, scale, out) =
        unsafe { (codes.as_slice::<u8>(), scale.as_slice::<f32>(), out.as_mut_slice::<f32>()) };
    let blocks = (TASK / block_size).max(1);
    let run = blocks * block_size;
    let elements = out.len();
    let tasks = codes.chunks(codec.stored(run)).zip(out.chunks_mut(run));
    let tasks: Vec<_> = tasks.zip(scale.chunks(blocks)).collect();
    threads.for_each(elements, tasks, |((codes, out), scale)| {
        let mut scratch = Vec::new();
        let blocks = codes.chunks(codec.stored(block_size)).zip(out.chunks_mut(block_size));
        for ((codes, out), &scale) in blocks.zip(scale) {
            codec.decode(codes, scale, out, &mut scratch);
        }
    });
    Ok(())
}
