//! Projection into a subspace, and back into weights.

use super::Side;
use crate::cpu::product::{Matrix, multiply_tile};
use crate::cpu::threads::Threads;
use crate::quant::bfloat16::round_stochastic;
use crate::quant::cpu::{Rounding, dithers_of};
use crate::quant::update::{Change, Scratch, update_run};
use crate::rng::Key;
use crate::tensor::{Floats, FloatsMut};

/// Rows or columns of a gradient in one task.
const TILE: usize = 96;
/// Rows of a weight in one task: its update has to stay in the second-level cache.
const ROWS: usize = 64;

/// One gradient and where its projection goes.
pub struct Projection<'a> {
    pub grad: Floats<'a>,
    pub rows: usize,
    pub columns: usize,
    pub basis: &'a [f32],
    pub rank: usize,
    pub out: &'a mut [f32],
}

struct ProjectionTile<'a> {
    grad: Floats<'a>,
    columns: usize,
    basis: &'a [f32],
    rank: usize,
    range: std::ops::Range<usize>,
    side: Side,
    out: &'a mut [f32],
}

/// `out = grad * basis` on the right side, `basis^T * grad` on the left one.
///
/// Left projections are computed transposed, a tile of columns at a time, and stored transposed
/// back; every element is one sum in a fixed order.
pub fn project(threads: Threads, items: Vec<Projection<'_>>) {
    let mut work = 0;
    let mut tiles = Vec::new();
    let mut left = Vec::new();
    for item in items {
        work += item.rows * item.columns * item.rank / 64;
        let Projection { grad, rows, columns, basis, rank, out } = item;
        match Side::of(rows, columns) {
            Side::Right => {
                for (i, out) in out.chunks_mut(TILE * rank).enumerate() {
                    let range = i * TILE..(i * TILE + TILE).min(rows);
                    let side = Side::Right;
                    tiles.push(ProjectionTile { grad, columns, basis, rank, range, side, out });
                }
            }
            Side::Left => left.push((grad, rows, columns, basis, rank, out)),
        }
    }
    threads.for_each(work, tiles, project_tile);
    for (grad, rows, columns, basis, rank, out) in left {
        let mut transposed = vec![0f32; out.len()];
        let tiles = transposed
            .chunks_mut(TILE * rank)
            .enumerate()
            .map(|(i, out)| {
                let range = i * TILE..(i * TILE + TILE).min(columns);
                ProjectionTile { grad, columns, basis, rank, range, side: Side::Left, out }
            })
            .collect();
        threads.for_each(rows * columns * rank / 64, tiles, project_tile);
        for (i, row) in transposed.chunks(rank).enumerate() {
            for (j, &value) in row.iter().enumerate() {
                out[j * columns + i] = value;
            }
        }
    }
}

fn project_tile(tile: ProjectionTile<'_>) {
    let ProjectionTile { grad, columns, basis, rank, range, side, out } = tile;
    let count = range.len();
    match side {
        Side::Right => {
            let mut buffer = Vec::new();
            let grad = grad.values(range.start * columns, count * columns, &mut buffer);
            multiply_tile(
                Matrix::rows(grad, count, columns),
                Matrix::rows(basis, columns, rank),
                out,
            );
        }
        Side::Left => {
            let rows = basis.len() / rank;
            if let Floats::F32(grad) = grad {
                let grad = Matrix::rows(grad, rows, columns).subcolumns(range.start, count);
                multiply_tile(grad.transposed(), Matrix::rows(basis, rows, rank), out);
                return;
            }
            let mut values = vec![0f32; rows * count];
            for (i, row) in values.chunks_mut(count).enumerate() {
                grad.widen(i * columns + range.start, row);
            }
            let grad = Matrix::rows(&values, rows, count).transposed();
            multiply_tile(grad, Matrix::rows(basis, rows, rank), out);
        }
    }
}

/// The two factors of a weight's update: `left [rows, rank] * right [rank, columns]`.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    columns: usize,
    left: Matrix<'a>,
    right: Matrix<'a>,
}

impl<'a> Factors<'a> {
    /// From the low-rank update and the basis it lies in.
    pub fn new(
        rows: usize,
        columns: usize,
        update: &'a [f32],
        basis: &'a [f32],
        rank: usize,
    ) -> Self {
        let (left, right) = match Side::of(rows, columns) {
            Side::Right => {
                (Matrix::rows(update, rows, rank), Matrix::rows(basis, columns, rank).transposed())
            }
            Side::Left => (Matrix::rows(basis, rows, rank), Matrix::rows(update, rank, columns)),
        };
        Self { columns, left, right }
    }

    /// The elements `first..first + count` of the product, in `buffer`.
    fn elements(self, first: usize, count: usize, buffer: &mut Vec<f32>) -> &[f32] {
        let top = first / self.columns;
        let bottom = (first + count).div_ceil(self.columns);
        buffer.resize((bottom - top) * self.columns, 0.0);
        multiply_tile(self.left.subrows(top, bottom - top), self.right, buffer);
        let skip = first - top * self.columns;
        &buffer[skip..skip + count]
    }
}

/// One float parameter and its update.
pub struct Addition<'a> {
    pub param: FloatsMut<'a>,
    pub factors: Factors<'a>,
    /// Rounds bfloat16 stochastically.
    pub key: Option<Key>,
}

/// `param = param * keep + alpha * update`, rounded once; not-finite updates count as zero.
pub fn project_back_add(threads: Threads, items: Vec<Addition<'_>>, change: Change) {
    let mut tasks = Vec::new();
    let mut work = 0;
    for Addition { mut param, factors, key } in items {
        work += param.len() * factors.left.column_count() / 64;
        let run = (ROWS * factors.columns).max(1);
        let mut first = 0;
        while param.len() > run {
            let (part, rest) = param.split_at(run);
            tasks.push((first, part, factors, key));
            (param, first) = (rest, first + run);
        }
        if !param.is_empty() {
            tasks.push((first, param, factors, key));
        }
    }
    threads.for_each(work, tasks, |(first, mut param, factors, key)| {
        let (mut buffer, mut dithers) = (Vec::new(), Vec::new());
        let mut values = vec![0f32; param.len()];
        param.widen(0, &mut values);
        add(&mut values, factors.elements(first, param.len(), &mut buffer), change);
        match (&mut param, key) {
            (FloatsMut::BF16(param), Some(key)) => {
                let dithers = dithers_of(key, first, values.len(), &mut dithers);
                round_stochastic(&values, dithers, param);
            }
            (param, _) => param.narrow(0, &values),
        }
    });
}

#[inline(always)]
fn add_kernel(values: &mut [f32], update: &[f32], change: Change) {
    for (value, &update) in values.iter_mut().zip(update) {
        let new = *value * change.keep + change.alpha * update;
        *value = if new.abs() < f32::INFINITY { new } else { *value };
    }
}

crate::multiversion! {
    fn add(values: &mut [f32], update: &[f32], change: Change) = add_kernel
}

/// One quantized weight and its update; a dense one has no factors.
pub struct Requantization<'a> {
    pub codes: &'a mut [u8],
    pub scale: &'a mut [f32],
    pub zero_point: &'a mut [u8],
    pub numel: usize,
    pub update: Update<'a>,
    pub rounding: Rounding,
}

#[derive(Clone, Copy)]
pub enum Update<'a> {
    Factors(Factors<'a>),
    Dense(&'a [f32]),
}

/// `weight = round(weight * keep + alpha * update)`, tile by tile: no tensor of the weight's size.
pub fn project_back_requantize(threads: Threads, items: Vec<Requantization<'_>>, change: Change) {
    let mut tasks = Vec::new();
    let mut work = 0;
    for item in items {
        let Requantization { codes, scale, zero_point, numel, update, rounding } = item;
        let columns = match update {
            Update::Factors(f) => {
                work += numel * f.left.column_count() / 64;
                f.columns
            }
            Update::Dense(_) => 1024,
        };
        work += numel;
        let size = rounding.group_size;
        let groups = (ROWS * columns).div_ceil(size).next_multiple_of(2);
        let run = groups * size;
        let stored = if rounding.format.bits == 4 { run / 2 } else { run };
        let mut zero_points = zero_point.chunks_mut(groups);
        for (i, (codes, scale)) in
            codes.chunks_mut(stored).zip(scale.chunks_mut(groups)).enumerate()
        {
            let zero_point = zero_points.next().unwrap_or_default();
            let first = i * run;
            let count = run.min(numel - first);
            tasks.push((first, count, codes, scale, zero_point, update, rounding));
        }
    }
    threads.for_each(work, tasks, |(first, count, codes, scale, zero_point, update, rounding)| {
        let mut buffer = Vec::new();
        let update = match update {
            Update::Factors(factors) => factors.elements(first, count, &mut buffer),
            Update::Dense(update) => &update[first..first + count],
        };
        let mut scratch = Scratch::default();
        update_run(update, first, rounding, change, codes, scale, zero_point, &mut scratch);
    });
}
