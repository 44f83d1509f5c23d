//! The leading singular subspace of a matrix by random projection (Halko, Martinsson, Tropp 2011,
//! arXiv 0909.4061), from nothing or from an earlier basis.

use super::orthonormal::{
    Goal, canonical_signs, dependent_columns, eigen, gram, normalize_columns, orthonormalize,
    scale_columns,
};
use super::source::{Source, product};
use crate::cpu::product::Matrix;
use crate::cpu::threads::Threads;
use crate::rng::{Key, fill_dithers};

/// Squared distances, of unit columns from the span of those before them, up to which a column
/// counts as dependent: tried one after the other.
const DEPENDENT: [f64; 3] = [1e-10, 1e-8, 1e-6];

/// Independent, symmetric, bounded random numbers of variance one.
fn random(key: Key, count: usize) -> Vec<f32> {
    let mut dithers = vec![0u16; count];
    fill_dithers(key, 0, &mut dithers);
    let unit = 12f32.sqrt() / 65_536.0;
    dithers.into_iter().map(|d| (f32::from(d) - 32_767.5) * unit).collect()
}

/// Orthonormal columns that span those of `y`; a column that depends on those before it gives way to
/// a random one, so that there are `columns` of them whatever the rank of `y`.
///
/// Of independent columns each keeps its place, and what it adds to those before it.
fn basis(
    threads: Threads,
    mut y: Vec<f32>,
    columns: usize,
    goal: Goal,
    key: Key,
) -> Option<Vec<f32>> {
    normalize_columns(&mut y, columns);
    let original = y.clone();
    if orthonormalize(threads, &mut y, columns, goal).is_some() {
        return Some(y);
    }
    let dense = gram(threads, &original, columns);
    for tolerance in DEPENDENT {
        let mut y = original.clone();
        let mut filling = random(key, y.len());
        normalize_columns(&mut filling, columns);
        for j in dependent_columns(&dense, tolerance) {
            let places = y.iter_mut().zip(&filling).skip(j).step_by(columns);
            places.for_each(|(value, &random)| *value = random);
        }
        if orthonormalize(threads, &mut y, columns, goal).is_some() {
            return Some(y);
        }
    }
    None
}

/// A basis of the leading right singular subspace, and what it was found with.
pub struct Subspace {
    /// Columns of the basis: rank plus oversampling.
    pub columns: usize,
    /// Row-major `[a.columns, columns]`, orthonormal columns.
    pub basis: Vec<f32>,
}

/// Finds the leading right singular subspace of `a` from a random sketch.
pub fn cold(
    threads: Threads,
    a: Source<'_>,
    columns: usize,
    power_iterations: usize,
    key: Key,
) -> Option<Subspace> {
    let goal = |left: usize| if left == 0 { Goal::Exact } else { Goal::Rough };
    let sketch = sketch(threads, a, columns, key);
    let mut z = basis(threads, sketch, columns, goal(power_iterations), key)?;
    for i in 0..power_iterations {
        let image = two_sided(threads, a, &z, columns);
        z = basis(threads, image, columns, goal(power_iterations - 1 - i), key)?;
    }
    Some(Subspace { columns, basis: z })
}

/// A random combination of the rows of `a`, for each of `columns` columns.
fn sketch(threads: Threads, a: Source<'_>, columns: usize, key: Key) -> Vec<f32> {
    let rows = a.row_count();
    let random = random(key, rows * columns);
    a.transposed().times(threads, Matrix::rows(&random, rows, columns))
}

/// `a^T a z` up to a power of two, which keeps the products of tiny and of huge matrices in the
/// range of float32.
fn two_sided(threads: Threads, a: Source<'_>, z: &[f32], columns: usize) -> Vec<f32> {
    let mut y = a.times(threads, Matrix::rows(z, a.column_count(), columns));
    let largest = y.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    let exponent = if largest.is_normal() { largest.log2().floor() as i32 } else { 0 };
    let inverse = 2f64.powi(-exponent);
    y.iter_mut().for_each(|v| *v = (f64::from(*v) * inverse) as f32);
    a.transposed().times(threads, Matrix::rows(&y, a.row_count(), columns))
}

/// Turns a basis to the singular directions inside it, the leading ones first.
///
/// Returns the squared singular values, the directions `[a.columns, columns]`, and their images
/// `a * directions`.
pub fn rotate(
    threads: Threads,
    a: Source<'_>,
    subspace: &Subspace,
) -> Option<(Vec<f64>, Vec<f32>, Vec<f32>)> {
    let columns = subspace.columns;
    let basis = Matrix::rows(&subspace.basis, a.column_count(), columns);
    let image = a.times(threads, basis);
    let (squares, rotation) = eigen(gram(threads, &image, columns).as_ref())?;
    let rotation = Matrix::rows(&rotation, columns, columns);
    let mut directions = product(threads, basis, rotation);
    let mut images = product(threads, Matrix::rows(&image, a.row_count(), columns), rotation);
    let signs = canonical_signs(&mut directions, columns);
    scale_columns(&mut images, &signs);
    Some((squares, directions, images))
}

/// The leading right singular directions of `a` from nothing: a random sketch, then one step of
/// subspace iteration on its range. `columns` directions, as [`warm`] returns them.
pub fn fresh(threads: Threads, a: Source<'_>, columns: usize, key: Key) -> Option<Vec<f32>> {
    let range = basis(threads, sketch(threads, a, columns, key), columns, Goal::Rough, key)?;
    if let Some(found) = warm(threads, a, &range, columns) {
        return Some(found);
    }
    // The matrix has fewer directions than asked for: the others are filled up.
    let image = two_sided(threads, a, &range, columns);
    let basis = basis(threads, image, columns, Goal::Exact, key)?;
    Some(rotate(threads, a, &Subspace { columns, basis })?.1)
}

/// An earlier basis `[n, rank]` with random columns beside it, `width` in all and orthonormal: by
/// these come directions that the matrix did not have before.
pub fn start_basis(
    threads: Threads,
    earlier: &[f32],
    rank: usize,
    width: usize,
    key: Key,
) -> Option<Vec<f32>> {
    let rows = earlier.len() / rank;
    let mut start = random(key, rows * width);
    let scale = (rows as f32).sqrt();
    for (row, earlier) in start.chunks_mut(width).zip(earlier.chunks(rank)) {
        let (kept, fresh) = row.split_at_mut(rank);
        kept.copy_from_slice(earlier);
        fresh.iter_mut().for_each(|value| *value /= scale);
    }
    orthonormalize(threads, &mut start, width, Goal::Rough)?;
    Some(start)
}

/// One step of subspace iteration from an earlier basis of `columns` directions.
///
/// Returns the directions in decreasing order of what they capture.
pub fn warm(threads: Threads, a: Source<'_>, earlier: &[f32], columns: usize) -> Option<Vec<f32>> {
    let mut z = two_sided(threads, a, earlier, columns);
    let factor = orthonormalize(threads, &mut z, columns, Goal::Exact)?;
    let (_, rotation) = eigen((&factor * factor.transpose()).as_ref())?;
    let rotation = Matrix::rows(&rotation, columns, columns);
    let mut directions = product(threads, Matrix::rows(&z, a.column_count(), columns), rotation);
    canonical_signs(&mut directions, columns);
    Some(directions)
}

/// Left singular vectors from images `a * v`, with columns that stay orthonormal where the
/// singular value vanishes.
pub fn left_vectors(
    threads: Threads,
    images: Vec<f32>,
    columns: usize,
    key: Key,
) -> Option<Vec<f32>> {
    basis(threads, images, columns, Goal::Exact, key)
}
