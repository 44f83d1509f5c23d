//! The selection among all weights of a matrix, or of several, on the CPU.

use super::cpu::{SCRATCH, Scratch, TASK, keep};
use super::score::Score;
use super::select::{self, Keys, SAMPLE, Threshold};
use crate::cpu::threads::Threads;
use crate::multiversion;
use crate::tensor::Float;

/// Bits of the first two digits of a key; the third has the ten that are left.
const DIGIT: usize = 11;
/// What a digit can be.
pub const BINS: usize = 1 << DIGIT;
/// Where the digits lie, from the highest on.
pub const SHIFTS: [usize; 3] = [32 - DIGIT, 32 - 2 * DIGIT, 0];

/// How many of the least elements are dropped.
#[derive(Clone, Copy, Debug)]
pub struct Drop {
    pub count: usize,
    /// As the reference of magnitude pruning: one more, and all that equal the last.
    pub through: bool,
}

/// The keys of a whole matrix, made anew whenever they are counted.
struct Recomputed<'a, T> {
    threads: Threads,
    weights: &'a [T],
    score: Score<'a>,
}

impl<T: Float> Recomputed<'_, T> {
    /// Calls `look` with the keys of every task, and gives its results in order.
    fn map<R: Send>(&self, look: impl Fn(&[i32]) -> R + Send + Sync) -> Vec<(usize, R)> {
        let tasks: Vec<_> = self.weights.chunks(TASK).enumerate().collect();
        self.threads.map(self.weights.len(), tasks, |(i, weights)| {
            SCRATCH.with_borrow_mut(|Scratch { keys, values, .. }| {
                keys.resize(weights.len(), 0);
                let nan = self.score.keys(weights, i * TASK, values, keys);
                (nan, look(keys))
            })
        })
    }
}

impl<T: Float> Keys for Recomputed<'_, T> {
    fn count(&self) -> usize {
        self.weights.len()
    }

    fn sample(&mut self, out: &mut Vec<i32>) {
        let step = self.weights.len().div_ceil(SAMPLE).max(1);
        let mut values = Vec::new();
        for element in (0..self.weights.len()).step_by(step) {
            let mut key = [0];
            self.score.keys(&self.weights[element..=element], element, &mut values, &mut key);
            out.extend(key);
        }
    }

    fn below(&mut self, pivots: [i32; 2]) -> [usize; 2] {
        let counts = self.map(|keys| select::count_below(keys, pivots));
        counts.into_iter().fold([0; 2], |[a, b], (_, [p, q])| [a + p, b + q])
    }

    fn within(&mut self, low: i32, high: i32, out: &mut Vec<i32>) {
        let found = self.map(|keys| {
            let mut found = Vec::new();
            select::take_within(keys, low, high, &mut found);
            found
        });
        found.into_iter().for_each(|(_, found)| out.extend(found));
    }
}

/// Keeps all but the least scores of a whole matrix, of equal ones the later; returns how many
/// scores are not a number.
pub fn select_matrix<T: Float>(
    threads: Threads,
    weights: &[T],
    score: Score<'_>,
    drop: Drop,
    mask: &mut [u8],
) -> usize {
    let count = weights.len();
    let mut keys = Recomputed { threads, weights, score };
    if count == 0 || drop.count >= count || (drop.count == 0 && !drop.through) {
        mask.fill(u8::from(drop.count < count));
        return keys.map(|_| ()).into_iter().map(|(nan, ())| nan).sum();
    }
    let rank = if drop.through { drop.count } else { drop.count - 1 };
    let mut candidates = Vec::new();
    let Threshold { key, less, equal } = select::threshold(&mut keys, rank, &mut candidates);
    let dropped = if drop.through { equal } else { drop.count - less };
    select_below(threads, weights, score, &mut Ties { key, dropped, equal }, mask)
}

/// What a threshold is, and how many of the scores that equal it are still to come, and to drop.
pub struct Ties {
    pub key: i32,
    pub dropped: usize,
    pub equal: usize,
}

/// Keeps what is above a threshold, and what equals it but for the first ones that are still to
/// drop, which are counted off; returns how many scores are not a number.
pub fn select_below<T: Float>(
    threads: Threads,
    weights: &[T],
    score: Score<'_>,
    ties: &mut Ties,
    mask: &mut [u8],
) -> usize {
    let key = ties.key;
    let count = weights.len();
    let keep_rest = ties.dropped < ties.equal || ties.dropped == 0;
    // How many of the equal keys from each task on are dropped.
    let mut firsts = Vec::new();
    if keep_rest && ties.dropped > 0 {
        let keys = Recomputed { threads, weights, score };
        for (_, [less, through]) in keys.map(|keys| select::count_below(keys, [key, key + 1])) {
            firsts.push(ties.dropped);
            ties.dropped = ties.dropped.saturating_sub(through - less);
            ties.equal = ties.equal.saturating_sub(through - less);
        }
    } else {
        firsts.resize(count.div_ceil(TASK), 0);
    }
    let tasks: Vec<_> =
        weights.chunks(TASK).zip(mask.chunks_mut(TASK)).zip(firsts).enumerate().collect();
    let counts = threads.map(count, tasks, |(i, ((weights, mask), mut first))| {
        SCRATCH.with_borrow_mut(|Scratch { keys, values, .. }| {
            keys.resize(weights.len(), 0);
            let nan = score.keys(weights, i * TASK, values, keys);
            keep(keys, key, &mut first, keep_rest, mask);
            nan
        })
    });
    counts.into_iter().sum()
}

/// Keys as integers without a sign, in the same order.
pub fn ordered(key: i32) -> u32 {
    key as u32 ^ 0x8000_0000
}

/// The key that [`ordered`] gives.
pub fn key_of(ordered: u32) -> i32 {
    (ordered ^ 0x8000_0000) as i32
}

#[inline(always)]
fn count_kernel(keys: &[i32], known: u32, prefix: u32, shift: usize, bins: &mut [u32; BINS]) {
    for &key in keys {
        let key = ordered(key);
        if key & known == prefix {
            bins[((key & !known) >> shift) as usize % BINS] += 1;
        }
    }
}

multiversion! {
    fn count_digits(keys: &[i32], known: u32, prefix: u32, shift: usize, bins: &mut [u32; BINS])
        = count_kernel
}

/// Adds to `counts` how many keys have which digit, of those whose higher digits are `prefix`'s.
pub fn score_histogram<T: Float>(
    threads: Threads,
    weights: &[T],
    score: Score<'_>,
    prefix: u32,
    shift: usize,
    counts: &mut [i64],
) {
    let keys = Recomputed { threads, weights, score };
    let end = if shift == 0 { SHIFTS[1] } else { shift + DIGIT };
    let known = (u64::from(u32::MAX) << end) as u32;
    let parts = keys.map(|keys| {
        let mut bins = Box::new([0; BINS]);
        count_digits(keys, known, prefix & known, shift, &mut bins);
        bins
    });
    for (_, bins) in parts {
        for (total, count) in counts.iter_mut().zip(bins.iter()) {
            *total += i64::from(*count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_without_a_sign_sort_alike() {
        let keys = [i32::MIN, -5, -1, 0, 1, 0x7f80_0000];
        assert!(keys.map(ordered).is_sorted());
        assert_eq!(keys.map(ordered).map(key_of), keys);
    }
}
