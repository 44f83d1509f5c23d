//! The dynamic 8-bit maps as operations on whole tensors.

use pyo3::prelude::*;

use super::dynamic::map;
use super::grid::sanitize;
use super::one_device;
use crate::dispatch::dispatch;
use crate::error::Result;
use crate::match_float;
use crate::tensor::{Arg, Check, DType, Float, TensorView};

fn check_blocks(
    check: Check,
    codes: &TensorView,
    scale: &TensorView,
    values: &TensorView,
    block_size: usize,
) -> Result<()> {
    check.value("block_size", block_size > 0, "at least 1", block_size)?;
    check.dtype("codes", codes, DType::U8)?;
    check.shape("codes", codes, values.shape())?;
    check.dtype("scale", scale, DType::F32)?;
    check.shape("scale", scale, &[values.numel().div_ceil(block_size)])
}

fn encode<T: Float>(
    x: &[T],
    codes: &mut [u8],
    scale: &mut [f32],
    signed: bool,
    block_size: usize,
) -> usize {
    let map = map(signed);
    let mut values = Vec::new();
    let mut replaced = 0;
    for ((x, codes), scale) in x.chunks(block_size).zip(codes.chunks_mut(block_size)).zip(scale) {
        values.resize(x.len(), 0.0);
        T::widen(x, &mut values);
        replaced += sanitize(&mut values);
        *scale = map.encode_block(&values, codes);
    }
    replaced
}

/// Quantizes `x` with the dynamic map of first moments (`signed`) or of second moments.
///
/// `scale` is the largest magnitude of each block. Returns the number of values not finite, which
/// count as zero (NaN) and as the extremes of the block's finite values.
#[pyfunction]
pub fn quantize_dynamic(
    py: Python<'_>,
    x: Arg,
    codes: Arg,
    scale: Arg,
    signed: bool,
    block_size: usize,
) -> PyResult<usize> {
    const OP: &str = "quantize_dynamic";
    let check = Check { op: OP };
    let x = check.input("x", x)?;
    let (mut codes, mut scale) = (check.output("codes", codes)?, check.output("scale", scale)?);
    check.float("x", &x)?;
    check.contiguous("x", &x)?;
    check_blocks(check, &codes, &scale, &x, block_size)?;
    let written = [("codes".into(), &codes), ("scale".into(), &scale)];
    let device = one_device(check, &written, &[("x".into(), &x)])?;
    dispatch(py, OP, device, |_| {
        // SAFETY: contiguous, on the CPU, of these dtypes, and disjoint: checked above.
        let (codes, scale) = unsafe { (codes.as_mut_slice(), scale.as_mut_slice()) };
        match_float!(x, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            Ok(encode(unsafe { x.as_slice::<T>() }, codes, scale, signed, block_size))
        })
    })
}

/// Writes the values behind dynamic codes into `out`.
#[pyfunction]
pub fn dequantize_dynamic(
    py: Python<'_>,
    codes: Arg,
    scale: Arg,
    out: Arg,
    signed: bool,
    block_size: usize,
) -> PyResult<()> {
    const OP: &str = "dequantize_dynamic";
    let check = Check { op: OP };
    let (codes, scale) = (check.input("codes", codes)?, check.input("scale", scale)?);
    let mut out = check.output("out", out)?;
    check.dtype("out", &out, DType::F32)?;
    check_blocks(check, &codes, &scale, &out, block_size)?;
    check.contiguous("codes", &codes)?;
    check.contiguous("scale", &scale)?;
    let read = [("codes".into(), &codes), ("scale".into(), &scale)];
    let device = one_device(check, &[("out".into(), &out)], &read)?;
    dispatch(py, OP, device, |_| {
        // SAFETY: contiguous, on the CPU, of these dtypes, and disjoint: checked above.
        let (codes, scale, out) =
            unsafe { (codes.as_slice::<u8>(), scale.as_slice::<f32>(), out.as_mut_slice::<f32>()) };
        let blocks = codes.chunks(block_size).zip(out.chunks_mut(block_size)).zip(scale);
        for ((codes, out), &scale) in blocks {
            map(signed).decode_block(codes, scale, out);
        }
        Ok(())
    })
}
