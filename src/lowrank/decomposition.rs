//! Randomized SVD of one matrix.

use pyo3::prelude::*;

use super::{Side, floats, range};
use crate::cpu::product::Matrix;
use crate::dispatch::{dispatch, no_kernel};
use crate::error::Error;
use crate::quant::one_device;
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, TensorView, TensorViewMut};

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
    let (u, s, vh) = (check.output("u", u)?, check.output("s", s)?, check.output("vh", vh)?);
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
    type Views = (TensorView, TensorViewMut, TensorViewMut, TensorViewMut);
    let cpu = |(x, u, s, vh): &mut Views, threads| {
        let mut values = vec![0f32; x.numel()];
        floats(OP, x)?.widen(0, &mut values);
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
    };
    dispatch(py, OP, device, (x, u, s, vh), cpu, no_kernel)
}
