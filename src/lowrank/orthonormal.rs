//! Orthonormal bases by CholeskyQR, and small symmetric eigenproblems.

use faer::linalg::matmul::triangular::{BlockStructure, matmul};
use faer::linalg::solvers::SelfAdjointEigen;
use faer::{Accum, Mat, MatRef, Par, Side};

use crate::cpu::product::{Matrix, multiply};
use crate::cpu::threads::Threads;

/// Rows that one task sums a Gram matrix over.
const ROWS: usize = 512;
/// CholeskyQR passes: two suffice up to a condition of 1e7, the others mend what is worse.
const PASSES: usize = 6;
/// How far from the identity a Gram matrix may be for one more pass to leave rounding alone.
const NEARLY: f64 = 1e-2;
/// How much the columns of a basis that is only worked on further may be short of orthogonal.
const ROUGHLY: f64 = 0.5;

/// `y^T y` in float64, summed in an order that does not depend on the number of threads. Only the
/// lower triangle means something.
pub fn gram(threads: Threads, y: &[f32], columns: usize) -> Mat<f64> {
    let rows = y.len() / columns.max(1);
    let tasks: Vec<&[f32]> = y.chunks(ROWS * columns.max(1)).collect();
    let parts = threads.map(rows * columns * columns / 64, tasks, |part| {
        let wide =
            Mat::from_fn(part.len() / columns, columns, |i, j| f64::from(part[i * columns + j]));
        let mut product = Mat::zeros(columns, columns);
        matmul(
            product.as_mut(),
            BlockStructure::TriangularLower,
            Accum::Replace,
            wide.transpose(),
            BlockStructure::Rectangular,
            &wide,
            BlockStructure::Rectangular,
            1.0,
            Par::Seq,
        );
        product
    });
    let mut sum = Mat::zeros(columns, columns);
    for part in parts {
        sum += part;
    }
    sum
}

/// The largest distance of a Gram matrix from the identity.
fn deviation(gram: &Mat<f64>) -> f64 {
    let mut largest = 0f64;
    for j in 0..gram.ncols() {
        for i in j..gram.nrows() {
            let distance = (gram[(i, j)] - if i == j { 1.0 } else { 0.0 }).abs();
            if distance.is_nan() {
                return f64::INFINITY;
            }
            largest = largest.max(distance);
        }
    }
    largest
}

/// How orthonormal columns have to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// To rounding.
    Exact,
    /// Well conditioned, for a basis that is multiplied further.
    Rough,
}

/// Makes the columns of `y` (row by row, `columns` of them) orthonormal in place, by CholeskyQR.
///
/// Returns the triangular factor `r` with `y_before = y_after * r`, or none when the columns are
/// linearly dependent, beyond what rounding allows; `y` then means nothing.
pub fn orthonormalize(
    threads: Threads,
    y: &mut Vec<f32>,
    columns: usize,
    goal: Goal,
) -> Option<Mat<f64>> {
    let rows = y.len() / columns.max(1);
    let mut factor = Mat::<f64>::identity(columns, columns);
    let mut out = vec![0f32; y.len()];
    for pass in 0..PASSES {
        let gram = gram(threads, y, columns);
        let off = deviation(&gram);
        if pass > 0 && goal == Goal::Rough && off < ROUGHLY {
            return Some(factor);
        }
        let lower = gram.llt(Side::Lower).ok()?.L().to_owned();
        let mut inverse = Mat::<f64>::identity(columns, columns);
        faer::linalg::triangular_solve::solve_lower_triangular_in_place(
            lower.as_ref(),
            inverse.as_mut(),
            Par::Seq,
        );
        let inverse: Vec<f32> =
            (0..columns * columns).map(|k| inverse[(k % columns, k / columns)] as f32).collect();
        multiply(
            threads,
            Matrix::rows(y, rows, columns),
            Matrix::rows(&inverse, columns, columns),
            &mut out,
        );
        std::mem::swap(y, &mut out);
        factor = lower.transpose() * factor;
        // Rounding in the product is all that a pass over nearly orthonormal columns leaves; and
        // a well-conditioned triangle leaves little more of any.
        if off < NEARLY || (goal == Goal::Rough && is_well_conditioned(&lower)) {
            return Some(factor);
        }
    }
    None
}

/// Whether the diagonal of a Cholesky factor tells that one pass in float32 does.
fn is_well_conditioned(lower: &Mat<f64>) -> bool {
    let (mut smallest, mut largest) = (f64::INFINITY, 0f64);
    for i in 0..lower.nrows() {
        smallest = smallest.min(lower[(i, i)]);
        largest = largest.max(lower[(i, i)]);
    }
    smallest > largest * 1e-2
}

/// Which columns of unit length lie within the root of `tolerance` of the span of those before
/// them, from the lower triangle of their Gram matrix: a Cholesky factorization that skips them.
pub fn dependent_columns(gram: &Mat<f64>, tolerance: f64) -> Vec<usize> {
    let n = gram.ncols();
    let mut lower = Mat::<f64>::zeros(n, n);
    let mut dependent = Vec::new();
    for j in 0..n {
        let known: f64 = (0..j).map(|k| lower[(j, k)] * lower[(j, k)]).sum();
        let pivot = gram[(j, j)] - known;
        // A NaN is no distance either.
        if pivot.is_nan() || pivot <= tolerance {
            dependent.push(j);
            continue;
        }
        lower[(j, j)] = pivot.sqrt();
        for i in j + 1..n {
            let known: f64 = (0..j).map(|k| lower[(i, k)] * lower[(j, k)]).sum();
            lower[(i, j)] = (gram[(i, j)] - known) / lower[(j, j)];
        }
    }
    dependent
}

/// Of a matrix given by its lower triangle: eigenvalues in decreasing order, and the eigenvectors as columns of a row-major matrix.
pub fn eigen(symmetric: MatRef<'_, f64>) -> Option<(Vec<f64>, Vec<f32>)> {
    let n = symmetric.nrows();
    let eigen = SelfAdjointEigen::new(symmetric, Side::Lower).ok()?;
    let (vectors, values) = (eigen.U(), eigen.S().column_vector());
    // They come in increasing order.
    let sorted = (0..n).rev().map(|i| values[i]).collect();
    let columns = (0..n * n).map(|k| vectors[(k / n, n - 1 - k % n)] as f32).collect();
    Some((sorted, columns))
}

/// Makes the entry of largest magnitude of every column positive; a tie goes to the lower index.
///
/// Returns the columns' signs.
pub fn canonical_signs(y: &mut [f32], columns: usize) -> Vec<f32> {
    let mut largest = vec![0f32; columns];
    for row in y.chunks(columns.max(1)) {
        for (best, &value) in largest.iter_mut().zip(row) {
            if value.abs() > best.abs() {
                *best = value;
            }
        }
    }
    let signs: Vec<f32> = largest.iter().map(|&v| if v < 0.0 { -1.0 } else { 1.0 }).collect();
    scale_columns(y, &signs);
    signs
}

/// Multiplies every column by its factor.
pub fn scale_columns(y: &mut [f32], factors: &[f32]) {
    for row in y.chunks_mut(factors.len().max(1)) {
        for (value, &factor) in row.iter_mut().zip(factors) {
            *value *= factor;
        }
    }
}

/// Divides every column by its norm; columns of zeros stay.
pub fn normalize_columns(y: &mut [f32], columns: usize) {
    let mut squares = vec![0f64; columns];
    for row in y.chunks(columns.max(1)) {
        for (sum, &value) in squares.iter_mut().zip(row) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    let inverse = |square: f64| if square > 0.0 { square.sqrt().recip() } else { 0.0 };
    let squares: Vec<f64> = squares.into_iter().map(inverse).collect();
    for row in y.chunks_mut(columns.max(1)) {
        for (value, &factor) in row.iter_mut().zip(&squares) {
            *value = (f64::from(*value) * factor) as f32;
        }
    }
}
