//! The projector of a gradient, found anew.

use super::range::{fresh, start_basis, warm};
use super::source::{Source, product};
use crate::cpu::product::Matrix;
use crate::cpu::threads::Threads;
use crate::multiversion;
use crate::rng::Key;

/// Directions beyond the rank that are carried along.
pub const OVERSAMPLE: usize = 8;

/// Random vectors that the captured energy is measured with. The directions are nearly singular
/// ones, whose images are nearly orthogonal: one vector of signs would nearly do.
pub const PROBES: usize = 4;

/// Elements of one partial sum of squares.
const SQUARES: usize = 1 << 16;

/// What became of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Refreshed = 0,
    /// The gradient is zero: the old basis stays, or unit vectors where there is none.
    Zero = 1,
    /// The gradient is not finite, or no basis could be found: the old basis stays.
    Kept = 2,
}

/// How large a matrix is.
pub struct Size {
    pub square_norm: f64,
    /// The signs `[columns, PROBES]` that the norm of a product was measured with.
    signs: Option<Vec<f32>>,
}

impl Size {
    /// Of a contiguous matrix, summed in an order that does not depend on the number of threads.
    pub fn of_elements(threads: Threads, x: &[f32]) -> Self {
        let tasks: Vec<&[f32]> = x.chunks(SQUARES).collect();
        let sums = threads.map(x.len(), tasks, sum_of_squares);
        Self { square_norm: sums.into_iter().sum(), signs: None }
    }

    /// Of a product, from a few random combinations of its columns.
    pub fn of_product(threads: Threads, a: Source<'_>, key: Key) -> Self {
        let columns = a.column_count();
        let signs = signs(columns, key);
        let images = a.times(threads, Matrix::rows(&signs, columns, PROBES));
        Self { square_norm: sum_of_squares(&images) / PROBES as f64, signs: Some(signs) }
    }
}

pub struct Outcome {
    pub status: Status,
    /// Of the leading directions before and after; NaN where there was none before.
    pub cosine: f32,
    /// Squared norm captured by the basis over that of the gradient.
    pub energy: f64,
}

/// Finds the `rank` leading right singular directions of `a`, and writes them to `basis`
/// (`[a.columns, rank]`, row by row) and the first of them to `vector`.
///
/// When `warm_start`, `basis` and `vector` hold the result of an earlier refresh, from which this
/// one starts. Never fails: whatever the gradient holds, a usable basis remains.
pub fn refresh(
    threads: Threads,
    a: Source<'_>,
    size: &Size,
    basis: &mut [f32],
    vector: &mut [f32],
    warm_start: bool,
    key: Key,
) -> Outcome {
    let rank = basis.len() / vector.len().max(1);
    let kept = |status| Outcome { status, cosine: f32::NAN, energy: f64::NAN };
    let found = if !size.square_norm.is_finite() {
        Err(Status::Kept)
    } else if size.square_norm == 0.0 {
        Err(Status::Zero)
    } else {
        find(threads, a, basis, rank, warm_start, key).ok_or(Status::Kept)
    };
    let directions = match found {
        Ok(found) => found,
        Err(status) => {
            if !warm_start {
                unit_vectors(basis, rank);
            }
            return kept(status);
        }
    };
    basis.copy_from_slice(&directions);
    let leading = directions.iter().step_by(rank);
    let (mut dot, mut old, mut new) = (0f64, 0f64, 0f64);
    for (before, &now) in vector.iter_mut().zip(leading) {
        dot += f64::from(*before) * f64::from(now);
        old += f64::from(*before) * f64::from(*before);
        new += f64::from(now) * f64::from(now);
        *before = now;
    }
    let captured = captured(threads, a, size, basis, rank, key);
    let cosine = if warm_start { (dot / (old * new).sqrt()) as f32 } else { f32::NAN };
    Outcome { status: Status::Refreshed, cosine, energy: (captured / size.square_norm).min(1.0) }
}

#[inline(always)]
fn sum_of_squares_kernel(x: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0f64; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
}

multiversion! {
    fn sum_of_squares(x: &[f32]) -> f64 = sum_of_squares_kernel
}

fn find(
    threads: Threads,
    a: Source<'_>,
    basis: &[f32],
    rank: usize,
    warm_start: bool,
    key: Key,
) -> Option<Vec<f32>> {
    let width = (rank + OVERSAMPLE).min(a.column_count());
    let leading =
        |wide: Vec<f32>| wide.chunks(width).flat_map(|row| &row[..rank]).copied().collect();
    if warm_start {
        let start = start_basis(threads, basis, rank, width, key);
        if let Some(directions) = start.and_then(|start| warm(threads, a, &start, width)) {
            return Some(leading(directions));
        }
        // Where the gradient has no more than `rank` directions, the random columns are too many.
        if let Some(directions) = warm(threads, a, basis, rank) {
            return Some(directions);
        }
    }
    fresh(threads, a, width, key).map(leading)
}

/// Columns of random signs.
fn signs(rows: usize, key: Key) -> Vec<f32> {
    (0..rows * PROBES).map(|i| if key.words(i as u64)[0] & 1 == 0 { 1.0 } else { -1.0 }).collect()
}

/// The squared norm of `a * basis`: the mean of that of `a * basis * s` over vectors `s` of random
/// signs (Hutchinson 1990), which costs a few products with vectors where `a * basis` costs `rank`.
/// Where the norm of `a` was measured with signs, their parts in the subspace are taken: what both
/// measures are off by is then nearly the same.
fn captured(
    threads: Threads,
    a: Source<'_>,
    size: &Size,
    basis: &[f32],
    rank: usize,
    key: Key,
) -> f64 {
    let columns = a.column_count();
    let basis = Matrix::rows(basis, columns, rank);
    let coefficients = match &size.signs {
        Some(signs) => product(threads, basis.transposed(), Matrix::rows(signs, columns, PROBES)),
        None => signs(rank, key),
    };
    let sums = product(threads, basis, Matrix::rows(&coefficients, rank, PROBES));
    let images = a.times(threads, Matrix::rows(&sums, columns, PROBES));
    sum_of_squares(&images) / PROBES as f64
}

fn unit_vectors(basis: &mut [f32], rank: usize) {
    basis.fill(0.0);
    for (i, row) in basis.chunks_mut(rank.max(1)).take(rank).enumerate() {
        row[i] = 1.0;
    }
}
