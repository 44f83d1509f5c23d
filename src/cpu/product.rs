//! Products of dense matrices, cut into tiles that do not depend on the number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::cpu::threads::Threads;

/// Rows or columns of one tile: enough that packing the other operand again does not matter, and few
/// enough that 512 of them are not one thread's work for twice as long as another's.
const TILE: usize = 96;

/// A matrix of float32 somewhere in memory, with strides in elements.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: MatRef<'a, f32>,
}

impl<'a> Matrix<'a> {
    /// A contiguous matrix, row by row.
    pub fn rows(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { values: MatRef::from_row_major_slice(values, rows, columns) }
    }

    pub fn transposed(self) -> Self {
        Self { values: self.values.transpose() }
    }

    pub fn row_count(self) -> usize {
        self.values.nrows()
    }

    pub fn column_count(self) -> usize {
        self.values.ncols()
    }

    pub fn subrows(self, first: usize, count: usize) -> Self {
        Self { values: self.values.subrows(first, count) }
    }

    pub fn subcolumns(self, first: usize, count: usize) -> Self {
        Self { values: self.values.subcols(first, count) }
    }

    /// The first columns.
    pub fn leading(self, count: usize) -> Self {
        self.subcolumns(0, count)
    }
}

/// `out = a * b` on the calling thread; `out` is contiguous, row by row.
pub fn multiply_tile(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32]) {
    let (rows, columns) = (a.row_count(), b.column_count());
    if a.column_count() == 0 {
        out.fill(0.0);
        return;
    }
    let out = MatMut::from_row_major_slice_mut(out, rows, columns);
    matmul(out, Accum::Replace, a.values, b.values, 1.0, Par::Seq);
}

/// One tile of a product, with the part of the output it fills.
struct Tile<'a, 'b> {
    a: Matrix<'a>,
    b: Matrix<'a>,
    out: MatMut<'b, f32>,
}

/// `out = a * b`; `out` is contiguous, row by row.
pub fn multiply(threads: Threads, a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32]) {
    let (rows, columns) = (a.row_count(), b.column_count());
    if rows == 0 || columns == 0 {
        return;
    }
    if a.column_count() == 0 {
        out.fill(0.0);
        return;
    }
    let mut rest = MatMut::from_row_major_slice_mut(out, rows, columns);
    let mut tiles = Vec::new();
    let by_rows = rows >= columns;
    let length = if by_rows { rows } else { columns };
    for first in (0..length).step_by(TILE) {
        let count = TILE.min(length - first);
        if by_rows {
            let (out, below) = rest.split_at_row_mut(count);
            tiles.push(Tile { a: a.subrows(first, count), b, out });
            rest = below;
        } else {
            let (out, right) = rest.split_at_col_mut(count);
            tiles.push(Tile { a, b: b.subcolumns(first, count), out });
            rest = right;
        }
    }
    let work = rows * columns * a.column_count() / 64;
    threads.for_each(work, tiles, |Tile { a, b, out }| {
        matmul(out, Accum::Replace, a.values, b.values, 1.0, Par::Seq);
    });
}
