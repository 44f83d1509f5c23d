//! Scores and selections on the CPU.

use std::cell::RefCell;

use super::score::Score;
use super::select::{self, Threshold};
use crate::cpu::threads::Threads;
use crate::multiversion;
use crate::tensor::Float;

/// Elements of one task.
pub const TASK: usize = 1 << 16;
/// Groups that are compared together.
const LANES: usize = 16;

/// Scratch of one thread.
#[derive(Default)]
pub struct Scratch {
    pub keys: Vec<i32>,
    pub candidates: Vec<i32>,
    pub values: Vec<f32>,
}

thread_local! {
    pub static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Writes the scores of weights.
pub fn score_weights<T: Float>(threads: Threads, weights: &[T], score: Score<'_>, out: &mut [f32]) {
    let tasks = weights.chunks(TASK).zip(out.chunks_mut(TASK)).enumerate().collect();
    threads.for_each(weights.len(), tasks, |(i, (weights, out)): (usize, (&[T], &mut [f32]))| {
        SCRATCH.with_borrow_mut(|scratch| {
            score.for_spans(weights, i * TASK, &mut scratch.values, |place, values| {
                out[place..place + values.len()].copy_from_slice(values);
            });
        });
    });
}

#[inline(always)]
fn above_kernel(keys: &[i32], key: i32, mask: &mut [u8]) {
    for (mask, other) in mask.iter_mut().zip(keys) {
        *mask = u8::from(*other > key);
    }
}

multiversion! {
    fn above(keys: &[i32], key: i32, mask: &mut [u8]) = above_kernel
}

/// Keeps the keys above the threshold, and those equal to it beyond the first `equal`, which is
/// decreased by those that it drops.
pub fn keep(keys: &[i32], key: i32, equal: &mut usize, keep_rest: bool, mask: &mut [u8]) {
    above(keys, key, mask);
    if keep_rest {
        for (mask, _) in mask.iter_mut().zip(keys).filter(|(_, other)| **other == key) {
            match equal.checked_sub(1) {
                Some(rest) => *equal = rest,
                None => *mask = 1,
            }
        }
    }
}

fn select_row(keys: &[i32], drop: usize, candidates: &mut Vec<i32>, mask: &mut [u8]) {
    if drop == 0 || drop == keys.len() {
        mask.fill(u8::from(drop == 0));
        return;
    }
    let Threshold { key, less, equal } = select::threshold(&mut &*keys, drop - 1, candidates);
    let mut dropped = drop - less;
    let keep_rest = dropped < equal;
    keep(keys, key, &mut dropped, keep_rest, mask);
}

/// Keeps all but the `drop` least scores of every row, of equal ones the later; returns how many
/// scores are not a number.
pub fn select_rows<T: Float>(
    threads: Threads,
    weights: &[T],
    score: Score<'_>,
    drop: usize,
    mask: &mut [u8],
) -> usize {
    each_row(threads, weights, score, mask, |keys, candidates, mask| {
        select_row(keys, drop, candidates, mask);
    })
}

/// Calls `select` with the keys of every row; returns how many scores are not a number.
fn each_row<T: Float>(
    threads: Threads,
    weights: &[T],
    score: Score<'_>,
    mask: &mut [u8],
    select: impl Fn(&[i32], &mut Vec<i32>, &mut [u8]) + Sync + Send,
) -> usize {
    let columns = score.columns;
    let rows = (TASK / columns).max(1);
    let run = rows * columns;
    let tasks = weights.chunks(run).zip(mask.chunks_mut(run)).enumerate().collect();
    let counts =
        threads.map(weights.len(), tasks, |(i, (weights, mask)): (usize, (&[T], &mut [u8]))| {
            SCRATCH.with_borrow_mut(|Scratch { keys, candidates, values }| {
                keys.resize(columns, 0);
                let mut nan = 0;
                for (row, (weights, mask)) in
                    weights.chunks(columns).zip(mask.chunks_mut(columns)).enumerate()
                {
                    let first = i * run + row * columns;
                    nan += score.keys(weights, first, values, keys);
                    select(keys, candidates, mask);
                }
                nan
            })
        });
    counts.into_iter().sum()
}

/// Keeps all but the `drop` least of a group: an element stays when at least so many come before it.
#[inline(always)]
pub fn keep_of_group(group: &[i32], drop: usize, mask: &mut [u8]) {
    for (j, mask) in mask.iter_mut().enumerate() {
        let before = |(i, key): (usize, &i32)| usize::from((*key, i) < (group[j], j));
        let rank: usize = group.iter().enumerate().map(before).sum();
        *mask = u8::from(rank >= drop);
    }
}

/// The comparisons of all pairs in groups of `M`, many groups side by side.
#[inline(always)]
fn keep_of_groups<const M: usize>(keys: &[i32], drop: usize, mask: &mut [u8]) {
    let mut rest = keys.chunks_exact(M * LANES);
    let mut masks = mask.chunks_exact_mut(M * LANES);
    for (keys, mask) in rest.by_ref().zip(masks.by_ref()) {
        let mut column = [[0i32; LANES]; M];
        for (lane, group) in keys.chunks_exact(M).enumerate() {
            for j in 0..M {
                column[j][lane] = group[j];
            }
        }
        let mut rank = [[0i32; LANES]; M];
        for i in 0..M {
            for j in i + 1..M {
                for lane in 0..LANES {
                    let greater = i32::from(column[i][lane] > column[j][lane]);
                    rank[i][lane] += greater;
                    rank[j][lane] += 1 - greater;
                }
            }
        }
        for (lane, group) in mask.chunks_exact_mut(M).enumerate() {
            for j in 0..M {
                group[j] = u8::from(rank[j][lane] >= drop as i32);
            }
        }
    }
    for (keys, mask) in rest.remainder().chunks(M).zip(masks.into_remainder().chunks_mut(M)) {
        keep_of_group(keys, drop, mask);
    }
}

#[inline(always)]
fn groups_kernel(keys: &[i32], size: usize, drop: usize, mask: &mut [u8]) {
    match size {
        2 => keep_of_groups::<2>(keys, drop, mask),
        4 => keep_of_groups::<4>(keys, drop, mask),
        8 => keep_of_groups::<8>(keys, drop, mask),
        16 => keep_of_groups::<16>(keys, drop, mask),
        _ => {
            for (keys, mask) in keys.chunks(size).zip(mask.chunks_mut(size)) {
                keep_of_group(keys, drop, mask);
            }
        }
    }
}

multiversion! {
    fn keep_in_groups(keys: &[i32], size: usize, drop: usize, mask: &mut [u8]) = groups_kernel
}

/// Groups from which on a threshold is faster than comparing all pairs.
const LARGE_GROUP: usize = 48;

/// Keeps all but the `drop` least scores of every `size` consecutive columns, which divide the
/// columns, of equal ones the later; returns how many scores are not a number.
pub fn select_groups<T: Float>(
    threads: Threads,
    weights: &[T],
    score: Score<'_>,
    size: usize,
    drop: usize,
    mask: &mut [u8],
) -> usize {
    each_row(threads, weights, score, mask, |keys, candidates, mask| {
        if size < LARGE_GROUP {
            keep_in_groups(keys, size, drop, mask);
            return;
        }
        for (keys, mask) in keys.chunks(size).zip(mask.chunks_mut(size)) {
            select_row(keys, drop, candidates, mask);
        }
    })
}
