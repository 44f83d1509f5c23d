//! Randomized SVD of one matrix.

use pyo3::prelude::*;

use super::refresh::Status;
use super::source::Source;
use super::{Side, check_workspace, cuda, floats, range};
use crate::cpu::product::Matrix;
use crate::cpu::threads::Threads;
use crate::dispatch::dispatch;
use crate::error::Result;
use crate::rng::{Key, Stream};
use crate::tensor::{Arg, Check, DType, TensorView, TensorViewMut};

/// The arguments of an SVD.
pub struct Svd {
    pub x: TensorView,
    pub u: TensorViewMut,
    pub s: TensorViewMut,
    pub vh: TensorViewMut,
    pub outcome: TensorViewMut,
    pub workspace: Option<TensorViewMut>,
    pub n_iter: usize,
    pub oversample: usize,
    pub key: Key,
}

/// Randomized SVD of `x` (`[m, n]`): writes `u` (`[m, rank]`), `s` (`[rank]`) and `vh`
/// (`[rank, n]`), float32.
///
/// The first element of `outcome` (`[3]`, float64) becomes 0, or 2 where `x` is not finite or no
/// basis could be found, and nothing else is written. `workspace` (uint8) has the size of
/// `svd_workspace` on devices.
#[pyfunction]
#[pyo3(signature = (x, u, s, vh, outcome, n_iter, oversample, seed, workspace=None))]
#[allow(clippy::too_many_arguments)]
pub fn svd(
    py: Python<'_>,
    x: Arg,
    u: Arg,
    s: Arg,
    vh: Arg,
    outcome: Arg,
    n_iter: usize,
    oversample: usize,
    seed: u64,
    workspace: Option<Arg>,
) -> PyResult<()> {
    const OP: &str = "svd";
    let check = Check { op: OP };
    let x = check.input("x", x)?;
    let (u, s, vh) = (check.output("u", u)?, check.output("s", s)?, check.output("vh", vh)?);
    let outcome = check.output("outcome", outcome)?;
    let workspace = check_workspace(check, workspace)?;
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
    check.dtype("outcome", &outcome, DType::F64)?;
    check.shape("outcome", &outcome, &[3])?;
    let device = {
        let mut written = vec![
            ("u".into(), &u),
            ("s".into(), &s),
            ("vh".into(), &vh),
            ("outcome".into(), &outcome),
        ];
        written.extend(workspace.iter().map(|view| ("workspace".into(), view)));
        check.one_device(&written, &[("x".into(), &x)])?
    };
    let key = Key::new(seed, Stream::Sketch, 0, 0);
    let args = Svd { x, u, s, vh, outcome, workspace, n_iter, oversample, key };
    dispatch(py, OP, device, args, svd_on_cpu, cuda::svd)
}

fn svd_on_cpu(args: &mut Svd, threads: Threads) -> Result<()> {
    let Svd { x, u, s, vh, outcome, n_iter, oversample, key, .. } = args;
    let (rows, columns) = (x.shape()[0], x.shape()[1]);
    let rank = s.numel();
    let mut values = vec![0f32; x.numel()];
    floats("svd", x)?.widen(0, &mut values);
    let largest = values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    // SAFETY: contiguous float64 on the CPU, which overlaps nothing.
    let outcome = unsafe { outcome.as_mut_slice::<f64>() };
    outcome.copy_from_slice(&[Status::Kept as u8 as f64, f64::NAN, f64::NAN]);
    if !largest.is_finite() {
        return Ok(());
    }
    // A power of two, so that neither squares nor this division lose anything.
    let exponent = if largest > 0.0 { largest.log2().floor() as i32 } else { 0 };
    let unit = 2f64.powi(exponent);
    values.iter_mut().for_each(|v| *v = (f64::from(*v) / unit) as f32);
    let side = Side::of(rows, columns);
    let a = Matrix::rows(&values, rows, columns);
    let a = if side == Side::Right { a } else { a.transposed() };
    let width = rank.saturating_add(*oversample).min(rows.min(columns));
    let Some((squares, right, left)) = find(threads, Source::Dense(a), width, *n_iter, *key) else {
        return Ok(());
    };
    // SAFETY: contiguous float32 on the CPU; they overlap nothing.
    let (u, s, vh) =
        unsafe { (u.as_mut_slice::<f32>(), s.as_mut_slice::<f32>(), vh.as_mut_slice::<f32>()) };
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
    outcome[0] = f64::from(Status::Refreshed as u8);
    Ok(())
}

/// Squared singular values of an upright matrix, right and left vectors.
fn find(
    threads: Threads,
    a: Source<'_>,
    width: usize,
    n_iter: usize,
    key: Key,
) -> Option<(Vec<f64>, Vec<f32>, Vec<f32>)> {
    let subspace = range::cold(threads, a, width, n_iter, key)?;
    let (squares, right, images) = range::rotate(threads, a, &subspace)?;
    let left = range::left_vectors(threads, images, width, key)?;
    Some((squares, right, left))
}
