//! One block of columns of the second-order method, row by row.

use super::cpu::keep_of_group;
use crate::cpu::threads::Threads;
use crate::multiversion;

/// Multiplications of one task.
const TASK: usize = 1 << 17;

/// Which columns are kept: as the mask says, or all but so many of every group, found on the way.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    Given,
    Groups { size: usize, drop: usize },
}

#[inline(always)]
fn row_kernel(
    factor: &[f32],
    pattern: Pattern,
    weight: &mut [f32],
    mask: &mut [u8],
    errors: &mut [f32],
    keys: &mut [i32],
) -> f32 {
    let width = weight.len();
    let mut loss = 0.0;
    for i in 0..width {
        if let Pattern::Groups { size, drop } = pattern
            && i % size == 0
        {
            for (key, j) in keys.iter_mut().zip(i..) {
                let score = weight[j].abs() * (1.0 / factor[j * width + j]);
                *key = ((score.to_bits() & 0x7fff_ffff) as i32).min(super::score::INFINITY);
            }
            keep_of_group(keys, drop, &mut mask[i..i + size]);
        }
        let (done, after) = weight.split_at_mut(i + 1);
        if mask[i] != 0 {
            errors[i] = 0.0;
            continue;
        }
        let row = &factor[i * width..(i + 1) * width];
        let error = done[i] / row[i];
        done[i] = 0.0;
        errors[i] = error;
        loss += error * error;
        if error != 0.0 {
            for (weight, factor) in after.iter_mut().zip(&row[i + 1..]) {
                *weight -= error * factor;
            }
        }
    }
    loss
}

multiversion! {
    fn prune_row(
        factor: &[f32],
        pattern: Pattern,
        weight: &mut [f32],
        mask: &mut [u8],
        errors: &mut [f32],
        keys: &mut [i32],
    ) -> f32 = row_kernel
}

/// A block of columns, and what becomes of it; contiguous, row by row.
pub struct Block<'a> {
    pub weight: &'a mut [f32],
    pub mask: &'a mut [u8],
    pub errors: &'a mut [f32],
    /// One for each row.
    pub loss: &'a mut [f32],
}

/// Zeroes columns and lets the later ones of the block make up for it; the block has `width`
/// columns, and `factor` is square.
pub fn prune_columns(
    threads: Threads,
    width: usize,
    factor: &[f32],
    pattern: Pattern,
    block: Block<'_>,
) {
    let Block { weight, mask, errors, loss } = block;
    if width == 0 {
        loss.fill(0.0);
        return;
    }
    let size = if let Pattern::Groups { size, .. } = pattern { size } else { 0 };
    let rows = (TASK / (width * width)).max(1);
    let run = rows * width;
    let tasks: Vec<_> = weight
        .chunks_mut(run)
        .zip(mask.chunks_mut(run))
        .zip(errors.chunks_mut(run))
        .zip(loss.chunks_mut(rows))
        .collect();
    let work = tasks.len() * run * width / 8;
    threads.for_each(work, tasks, |(((weight, mask), errors), loss)| {
        let mut keys = vec![0; size];
        for (((weight, mask), errors), loss) in weight
            .chunks_mut(width)
            .zip(mask.chunks_mut(width))
            .zip(errors.chunks_mut(width))
            .zip(loss)
        {
            *loss = prune_row(factor, pattern, weight, mask, errors, &mut keys);
        }
    });
}
