//! The projector of a gradient, found anew.

use super::range::{cold, rotate, warm};
use crate::cpu::product::Matrix;
use crate::cpu::threads::Threads;
use crate::rng::Key;

/// Directions beyond the rank that a cold start carries along.
const OVERSAMPLE: usize = 8;

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
    a: Matrix<'_>,
    square_norm: f64,
    basis: &mut [f32],
    vector: &mut [f32],
    warm_start: bool,
    key: Key,
) -> Outcome {
    let rank = basis.len() / vector.len().max(1);
    let kept = |status| Outcome { status, cosine: f32::NAN, energy: f64::NAN };
    let found = if !square_norm.is_finite() {
        Err(Status::Kept)
    } else if square_norm == 0.0 {
        Err(Status::Zero)
    } else {
        find(threads, a, basis, rank, warm_start, key).ok_or(Status::Kept)
    };
    let (captured, directions) = match found {
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
    let cosine = if warm_start { (dot / (old * new).sqrt()) as f32 } else { f32::NAN };
    Outcome { status: Status::Refreshed, cosine, energy: (captured / square_norm).min(1.0) }
}

fn find(
    threads: Threads,
    a: Matrix<'_>,
    basis: &[f32],
    rank: usize,
    warm_start: bool,
    key: Key,
) -> Option<(f64, Vec<f32>)> {
    if warm_start && let Some(found) = warm(threads, a, basis, rank) {
        return Some(found);
    }
    let width = (rank + OVERSAMPLE).min(a.column_count());
    let subspace = cold(threads, a, width, 1, key)?;
    let (squares, directions, _) = rotate(threads, a, &subspace)?;
    let leading = directions.chunks(width).flat_map(|row| &row[..rank]).copied().collect();
    Some((squares[..rank].iter().sum(), leading))
}

fn unit_vectors(basis: &mut [f32], rank: usize) {
    basis.fill(0.0);
    for (i, row) in basis.chunks_mut(rank.max(1)).take(rank).enumerate() {
        row[i] = 1.0;
    }
}
