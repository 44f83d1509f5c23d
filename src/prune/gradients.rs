//! Gradients of single samples, added up as their sizes or squares.

use pyo3::prelude::*;

use super::cuda;
use crate::cpu::threads::Threads;
use crate::dispatch::dispatch;
use crate::match_float;
use crate::multiversion;
use crate::tensor::{Arg, Check, DType, Float, TensorView, TensorViewMut};

/// Elements of one task.
const TASK: usize = 1 << 16;
/// Elements that are widened at once.
const SPAN: usize = 2048;

/// The arguments of one addition.
pub struct Gradients {
    pub total: TensorViewMut,
    pub part: TensorView,
    pub nonfinite: TensorViewMut,
    pub squared: bool,
    pub scale: f32,
}

#[inline(always)]
fn add_terms(part: &[f32], total: &mut [f32], term: impl Fn(f32) -> f32) -> usize {
    let mut bad = 0;
    for (part, total) in part.chunks(SPAN).zip(total.chunks_mut(SPAN)) {
        let mut count = 0u32;
        for (part, total) in part.iter().zip(total) {
            let term = term(*part);
            let good = term <= f32::MAX;
            count += u32::from(!good);
            *total += if good { term } else { 0.0 };
        }
        bad += count as usize;
    }
    bad
}

#[inline(always)]
fn add_kernel(part: &[f32], squared: bool, scale: f32, total: &mut [f32]) -> usize {
    if squared {
        add_terms(part, total, |value| (scale * value) * (scale * value))
    } else {
        add_terms(part, total, |value| (scale * value).abs())
    }
}

multiversion! {
    fn add(part: &[f32], squared: bool, scale: f32, total: &mut [f32]) -> usize = add_kernel
}

fn add_run<T: Float>(part: &[T], squared: bool, scale: f32, total: &mut [f32]) -> usize {
    if let Some(part) = T::as_f32(part) {
        return add(part, squared, scale, total);
    }
    let mut values = [0.0; SPAN];
    let mut bad = 0;
    for (part, total) in part.chunks(SPAN).zip(total.chunks_mut(SPAN)) {
        let values = &mut values[..part.len()];
        T::widen(part, values);
        bad += add(values, squared, scale, total);
    }
    bad
}

fn add_all<T: Float>(
    threads: Threads,
    part: &[T],
    squared: bool,
    scale: f32,
    total: &mut [f32],
) -> usize {
    let tasks = part.chunks(TASK).zip(total.chunks_mut(TASK)).collect();
    let counts = threads.map(part.len(), tasks, |(part, total): (&[T], &mut [f32])| {
        add_run(part, squared, scale, total)
    });
    counts.into_iter().sum()
}

/// Adds `|scale part|`, or with `squared` its square, to `total` (float32).
///
/// A term that is not finite is left out, and `nonfinite` (int64) increased by one.
#[pyfunction]
pub fn accumulate_gradients(
    py: Python<'_>,
    total: Arg,
    part: Arg,
    nonfinite: Arg,
    squared: bool,
    scale: f32,
) -> PyResult<()> {
    const OP: &str = "accumulate_gradients";
    let check = Check { op: OP };
    let total = check.output("total", total)?;
    let part = check.input("part", part)?;
    let nonfinite = check.output("nonfinite", nonfinite)?;
    check.dtype("total", &total, DType::F32)?;
    check.float("part", &part)?;
    check.shape("part", &part, total.shape())?;
    check.contiguous("part", &part)?;
    check.dtype("nonfinite", &nonfinite, DType::I64)?;
    check.shape("nonfinite", &nonfinite, &[1])?;
    check.value("scale", scale.is_finite(), "finite", scale)?;
    let device = check.one_device(
        &[("total".into(), &total), ("nonfinite".into(), &nonfinite)],
        &[("part".into(), &part)],
    )?;
    let args = Gradients { total, part, nonfinite, squared, scale };
    let cpu = |args: &mut Gradients, threads| {
        let Gradients { total, part, nonfinite, squared, scale } = args;
        // SAFETY: on the CPU, contiguous, of these dtypes, and disjoint.
        let (total, nonfinite) =
            unsafe { (total.as_mut_slice::<f32>(), nonfinite.as_mut_slice::<i64>()) };
        let found = match_float!(part, OP, |T| {
            // SAFETY: contiguous, on the CPU, of dtype T; no output overlaps it.
            let part = unsafe { part.as_slice::<T>() };
            Ok(add_all(threads, part, *squared, *scale, total))
        })?;
        nonfinite[0] += found as i64;
        Ok(())
    };
    dispatch(py, OP, device, args, cpu, cuda::accumulate_gradients)
}
