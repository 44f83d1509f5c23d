//! Integer quantization: groups of consecutive elements with a scale each.

pub mod bfloat16;
pub mod blocks;
pub mod cpu;
pub mod cuda;
pub mod dynamic;
mod dynamic_ops;
pub mod grid;
pub mod pack;
pub mod update;

pub use dynamic_ops::{
    DynamicDequantization, DynamicQuantization, dequantize_dynamic, quantize_dynamic,
};

use half::bf16;
use pyo3::prelude::*;

use crate::dispatch::dispatch;
use crate::error::{Name, Result};
use crate::match_float;
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, Element, TensorView, TensorViewMut};
use cpu::Rounding;
use grid::Format;

/// Checks the codes of `numel` elements that have the shape of `values`.
fn check_codes(
    check: Check,
    codes: &TensorView,
    values: &TensorView,
    format: Format,
) -> Result<()> {
    if format.bits == 4 {
        check.dtype("codes", codes, DType::U8)?;
        return check.shape("codes", codes, &[values.numel().div_ceil(2)]);
    }
    check.dtype("codes", codes, if format.symmetric { DType::I8 } else { DType::U8 })?;
    check.shape("codes", codes, values.shape())
}

/// Checks the grids of `numel` elements.
pub(crate) fn check_grids(
    check: Check,
    scale: &TensorView,
    zero_point: Option<&TensorView>,
    numel: usize,
    group_size: usize,
) -> Result<()> {
    check.value("group_size", group_size > 0, "at least 1", group_size)?;
    let groups = numel.div_ceil(group_size);
    check.dtype("scale", scale, DType::F32)?;
    check.shape("scale", scale, &[groups])?;
    if let Some(zero_point) = zero_point {
        check.dtype("zero_point", zero_point, DType::U8)?;
        check.shape("zero_point", zero_point, &[groups])?;
    }
    Ok(())
}

/// The bytes of a contiguous 8-bit tensor.
///
/// # Safety
/// As for [`TensorViewMut::as_mut_slice`].
pub(crate) unsafe fn bytes_mut(codes: &mut TensorViewMut) -> &mut [u8] {
    if codes.dtype() == u8::DTYPE {
        // SAFETY: by the caller's word, and the dtype was just compared.
        return unsafe { codes.as_mut_slice::<u8>() };
    }
    // SAFETY: by the caller's word; i8 and u8 have the same size and alignment.
    let codes = unsafe { codes.as_mut_slice::<i8>() };
    // SAFETY: every byte pattern is valid for both types.
    unsafe { std::slice::from_raw_parts_mut(codes.as_mut_ptr().cast(), codes.len()) }
}

/// The bytes of a contiguous 8-bit tensor.
///
/// # Safety
/// As for [`TensorView::as_slice`].
pub(crate) unsafe fn bytes(codes: &TensorView) -> &[u8] {
    if codes.dtype() == u8::DTYPE {
        // SAFETY: by the caller's word, and the dtype was just compared.
        return unsafe { codes.as_slice::<u8>() };
    }
    // SAFETY: by the caller's word; i8 and u8 have the same size and alignment.
    let codes = unsafe { codes.as_slice::<i8>() };
    // SAFETY: every byte pattern is valid for both types.
    unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), codes.len()) }
}

/// A counter of values that are not finite, which an op increases and nobody waits for.
pub(crate) fn counter(check: Check, arg: Arg) -> Result<TensorViewMut> {
    let counter = check.output("nonfinite", arg)?;
    check.dtype("nonfinite", &counter, DType::I64)?;
    check.shape("nonfinite", &counter, &[1])?;
    Ok(counter)
}

/// # Safety
/// As for [`TensorViewMut::as_mut_slice`]; `counter` comes from [`counter`].
pub(crate) unsafe fn count(counter: &mut TensorViewMut, more: usize) {
    // SAFETY: by the caller's word, and one int64 as checked.
    unsafe { counter.as_mut_slice::<i64>()[0] += more as i64 }
}

/// The arguments of one quantization.
pub struct Quantization {
    x: TensorView,
    codes: TensorViewMut,
    scale: TensorViewMut,
    zero_point: Option<TensorViewMut>,
    nonfinite: TensorViewMut,
    rounding: Rounding,
}

/// Quantizes `x` in groups of `group_size` consecutive elements.
///
/// Written are `codes`, `scale` (float32, one per group) and, for affine codes, `zero_point`
/// (uint8, one per group). `nonfinite` (int64) is increased by the number of NaN and infinite
/// values, which count as zero and as the extremes of their group's finite values.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn quantize_blockwise(
    py: Python<'_>,
    x: Arg,
    codes: Arg,
    scale: Arg,
    zero_point: Option<Arg>,
    nonfinite: Arg,
    bits: u8,
    stochastic: bool,
    group_size: usize,
    seed: u64,
    tensor_id: u32,
    step: u32,
) -> PyResult<()> {
    const OP: &str = "quantize_blockwise";
    let check = Check { op: OP };
    let format = Format::new(check, bits, zero_point.is_none())?;
    let x = check.input("x", x)?;
    let codes = check.output("codes", codes)?;
    let scale = check.output("scale", scale)?;
    let zero_point = zero_point.map(|arg| check.output("zero_point", arg)).transpose()?;
    let nonfinite = counter(check, nonfinite)?;
    check.float("x", &x)?;
    check.contiguous("x", &x)?;
    check_codes(check, &codes, &x, format)?;
    check_grids(check, &scale, zero_point.as_deref(), x.numel(), group_size)?;
    let device = {
        let mut written: Vec<(Name, &TensorViewMut)> = vec![
            ("codes".into(), &codes),
            ("scale".into(), &scale),
            ("nonfinite".into(), &nonfinite),
        ];
        written.extend(zero_point.as_ref().map(|t| (Name::from("zero_point"), t)));
        check.one_device(&written, &[("x".into(), &x)])?
    };
    let key = stochastic.then(|| Key::new(seed, Stream::Quantize, tensor_id, step));
    let rounding = Rounding { format, group_size, key };
    let args = Quantization { x, codes, scale, zero_point, nonfinite, rounding };
    let cpu = |args: &mut Quantization, threads| {
        let Quantization { x, codes, scale, zero_point, nonfinite, rounding } = args;
        // SAFETY: contiguous, on the CPU, of these dtypes, and disjoint: all checked above.
        let (codes, scale, zero_point) = unsafe {
            (
                bytes_mut(codes),
                scale.as_mut_slice(),
                zero_point.as_mut().map(|t| t.as_mut_slice()).unwrap_or_default(),
            )
        };
        let replaced = match_float!(x, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            let x = unsafe { x.as_slice::<T>() };
            Ok(cpu::quantize_blockwise(threads, x, *rounding, codes, scale, zero_point))
        })?;
        // SAFETY: as the others.
        unsafe { count(nonfinite, replaced) };
        Ok(())
    };
    dispatch(py, OP, device, args, cpu, cuda::quantize_blockwise)
}

/// The arguments of one dequantization.
pub struct Dequantization {
    codes: TensorView,
    scale: TensorView,
    zero_point: Option<TensorView>,
    out: TensorViewMut,
    format: Format,
    group_size: usize,
}

/// Writes the values behind `codes` into `out`, the inverse of `quantize_blockwise`.
#[pyfunction]
pub fn dequantize_blockwise(
    py: Python<'_>,
    codes: Arg,
    scale: Arg,
    zero_point: Option<Arg>,
    out: Arg,
    bits: u8,
    group_size: usize,
) -> PyResult<()> {
    const OP: &str = "dequantize_blockwise";
    let check = Check { op: OP };
    let format = Format::new(check, bits, zero_point.is_none())?;
    let codes = check.input("codes", codes)?;
    let scale = check.input("scale", scale)?;
    let zero_point = zero_point.map(|arg| check.input("zero_point", arg)).transpose()?;
    let out = check.output("out", out)?;
    check.float("out", &out)?;
    check_codes(check, &codes, &out, format)?;
    check_grids(check, &scale, zero_point.as_ref(), out.numel(), group_size)?;
    let mut read: Vec<(Name, &TensorView)> =
        vec![("codes".into(), &codes), ("scale".into(), &scale)];
    read.extend(zero_point.as_ref().map(|t| (Name::from("zero_point"), t)));
    for (name, t) in &read {
        check.contiguous(*name, t)?;
    }
    let device = check.one_device(&[("out".into(), &out)], &read)?;
    let args = Dequantization { codes, scale, zero_point, out, format, group_size };
    let cpu = |args: &mut Dequantization, threads| {
        let Dequantization { codes, scale, zero_point, out, format, group_size } = args;
        // SAFETY: contiguous, on the CPU, of these dtypes, and not overlapping `out`.
        let (codes, scale, zero_point) = unsafe {
            (
                bytes(codes),
                scale.as_slice(),
                zero_point.as_ref().map(|t| t.as_slice()).unwrap_or_default(),
            )
        };
        let (format, size) = (*format, *group_size);
        match_float!(out, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T, and disjoint from the inputs.
            let out = unsafe { out.as_mut_slice::<T>() };
            cpu::dequantize_blockwise(threads, codes, scale, zero_point, format, size, out);
            Ok(())
        })
    };
    dispatch(py, OP, device, args, cpu, cuda::dequantize_blockwise)
}

/// Packs 4-bit codes (uint8, 0 to 15) two to the byte, the first in the low nibble.
#[pyfunction]
pub fn pack_int4(py: Python<'_>, codes: Arg, packed: Arg) -> PyResult<()> {
    const OP: &str = "pack_int4";
    let check = Check { op: OP };
    let (codes, packed) = (check.input("codes", codes)?, check.output("packed", packed)?);
    check.dtype("codes", &codes, DType::U8)?;
    check.dtype("packed", &packed, DType::U8)?;
    check.contiguous("codes", &codes)?;
    check.shape("packed", &packed, &[codes.numel().div_ceil(2)])?;
    let device = check.one_device(&[("packed".into(), &packed)], &[("codes".into(), &codes)])?;
    let cpu = |(codes, packed): &mut (TensorView, TensorViewMut), _| {
        // SAFETY: contiguous uint8 on the CPU, and disjoint.
        let (codes, packed) = unsafe { (codes.as_slice(), packed.as_mut_slice()) };
        pack::pack(codes, 0, packed);
        Ok(())
    };
    dispatch(py, OP, device, (codes, packed), cpu, cuda::pack_int4)
}

/// Unpacks what `pack_int4` packed; the number of codes is that of `codes`.
#[pyfunction]
pub fn unpack_int4(py: Python<'_>, packed: Arg, codes: Arg) -> PyResult<()> {
    const OP: &str = "unpack_int4";
    let check = Check { op: OP };
    let (packed, codes) = (check.input("packed", packed)?, check.output("codes", codes)?);
    check.dtype("packed", &packed, DType::U8)?;
    check.dtype("codes", &codes, DType::U8)?;
    check.contiguous("packed", &packed)?;
    check.shape("packed", &packed, &[codes.numel().div_ceil(2)])?;
    let device = check.one_device(&[("codes".into(), &codes)], &[("packed".into(), &packed)])?;
    let cpu = |(packed, codes): &mut (TensorView, TensorViewMut), _| {
        // SAFETY: contiguous uint8 on the CPU, and disjoint.
        let (packed, codes) = unsafe { (packed.as_slice(), codes.as_mut_slice()) };
        pack::unpack(packed, 0, codes);
        Ok(())
    };
    dispatch(py, OP, device, (packed, codes), cpu, cuda::unpack_int4)
}

/// Rounds float32 `x` stochastically into bfloat16 `out` of the same shape.
#[pyfunction]
pub fn round_bf16_stochastic(
    py: Python<'_>,
    x: Arg,
    out: Arg,
    seed: u64,
    tensor_id: u32,
    step: u32,
) -> PyResult<()> {
    const OP: &str = "round_bf16_stochastic";
    let check = Check { op: OP };
    let (x, out) = (check.input("x", x)?, check.output("out", out)?);
    check.dtype("x", &x, DType::F32)?;
    check.dtype("out", &out, DType::BF16)?;
    check.contiguous("x", &x)?;
    check.shape("out", &out, x.shape())?;
    let device = check.one_device(&[("out".into(), &out)], &[("x".into(), &x)])?;
    let key = Key::new(seed, Stream::Bfloat16, tensor_id, step);
    let cpu = |(x, out, key): &mut (TensorView, TensorViewMut, Key), threads| {
        // SAFETY: contiguous, on the CPU, of these dtypes, and disjoint.
        let (x, out) = unsafe { (x.as_slice::<f32>(), out.as_mut_slice::<bf16>()) };
        bfloat16::round_bf16_stochastic(threads, x, *key, out);
        Ok(())
    };
    dispatch(py, OP, device, (x, out, key), cpu, cuda::round_bf16_stochastic)
}
