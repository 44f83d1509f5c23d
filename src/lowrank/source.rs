//! The matrix whose leading directions are sought: given by its elements, or as a product.

use crate::cpu::product::{Matrix, multiply};
use crate::cpu::threads::Threads;

/// A matrix that is only multiplied with others.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    Dense(Matrix<'a>),
    /// `left * right`, which is never formed.
    Factors {
        left: Matrix<'a>,
        right: Matrix<'a>,
    },
}

/// The product in a new matrix.
pub fn product(threads: Threads, a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let mut out = vec![0f32; a.row_count() * b.column_count()];
    multiply(threads, a, b, &mut out);
    out
}

impl<'a> Source<'a> {
    pub fn row_count(self) -> usize {
        match self {
            Self::Dense(a) => a.row_count(),
            Self::Factors { left, .. } => left.row_count(),
        }
    }

    pub fn column_count(self) -> usize {
        match self {
            Self::Dense(a) => a.column_count(),
            Self::Factors { right, .. } => right.column_count(),
        }
    }

    pub fn transposed(self) -> Self {
        match self {
            Self::Dense(a) => Self::Dense(a.transposed()),
            Self::Factors { left, right } => {
                Self::Factors { left: right.transposed(), right: left.transposed() }
            }
        }
    }

    /// The product with `b` in a new matrix.
    pub fn times(self, threads: Threads, b: Matrix<'_>) -> Vec<f32> {
        match self {
            Self::Dense(a) => product(threads, a, b),
            Self::Factors { left, right } => {
                let inner = product(threads, right, b);
                let inner = Matrix::rows(&inner, right.row_count(), b.column_count());
                product(threads, left, inner)
            }
        }
    }
}
