//! The key of a given rank among many, without sorting them: counts narrow a bracket around it.

use crate::multiversion;

/// So few keys are taken out of a bracket and sorted.
const FEW: usize = 48;
/// Keys of the sample that the first bracket comes from.
pub const SAMPLE: usize = 32;
/// Keys that are looked at together when few of them are wanted.
const CHUNK: usize = 64;

/// The key of the wanted rank, and how many are less and how many the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threshold {
    pub key: i32,
    pub less: usize,
    pub equal: usize,
}

/// Keys that can be counted as often as it takes.
pub trait Keys {
    fn count(&self) -> usize;
    /// Up to [`SAMPLE`] of the keys, spread evenly.
    fn sample(&mut self, out: &mut Vec<i32>);
    /// How many keys are below each of the two pivots.
    fn below(&mut self, pivots: [i32; 2]) -> [usize; 2];
    /// All keys from `low` to below `high`.
    fn within(&mut self, low: i32, high: i32, out: &mut Vec<i32>);
}

#[inline(always)]
fn below_kernel(keys: &[i32], pivots: [i32; 2]) -> [usize; 2] {
    let [p, q] = pivots;
    let mut total = [0; 2];
    for keys in keys.chunks(1 << 20) {
        let (mut a, mut b) = (0u32, 0u32);
        for &key in keys {
            a += u32::from(key < p);
            b += u32::from(key < q);
        }
        total[0] += a as usize;
        total[1] += b as usize;
    }
    total
}

multiversion! {
    pub fn count_below(keys: &[i32], pivots: [i32; 2]) -> [usize; 2] = below_kernel
}

#[inline(always)]
fn within_kernel(keys: &[i32], low: i32, high: i32, out: &mut Vec<i32>) {
    let width = high.wrapping_sub(low) as u32;
    let inside = |key: i32| (key.wrapping_sub(low) as u32) < width;
    for keys in keys.chunks(CHUNK) {
        let found: u32 = keys.iter().map(|&key| u32::from(inside(key))).sum();
        if found > 0 {
            out.extend(keys.iter().copied().filter(|&key| inside(key)));
        }
    }
}

multiversion! {
    pub fn take_within(keys: &[i32], low: i32, high: i32, out: &mut Vec<i32>) = within_kernel
}

/// Keys in memory.
impl Keys for &[i32] {
    fn count(&self) -> usize {
        self.len()
    }

    fn sample(&mut self, out: &mut Vec<i32>) {
        let step = self.len().div_ceil(SAMPLE).max(1);
        out.extend(self.iter().step_by(step));
    }

    fn below(&mut self, pivots: [i32; 2]) -> [usize; 2] {
        count_below(self, pivots)
    }

    fn within(&mut self, low: i32, high: i32, out: &mut Vec<i32>) {
        take_within(self, low, high, out);
    }
}

/// The wanted key lies from `low` to below `high`; so many keys are below each of them.
#[derive(Clone, Copy)]
struct Bracket {
    low: i32,
    high: i32,
    below_low: usize,
    below_high: usize,
}

impl Bracket {
    fn inside(self) -> usize {
        self.below_high - self.below_low
    }

    fn width(self) -> i64 {
        i64::from(self.high) - i64::from(self.low)
    }

    /// `pivot` where it cuts the bracket in two, else the nearest that does.
    fn clamp(self, pivot: i64) -> i32 {
        pivot.clamp(i64::from(self.low) + 1, i64::from(self.high) - 1) as i32
    }

    /// Two pivots around the place of the wanted key, were all keys inside spread evenly.
    fn interpolated(self, rank: usize) -> [i32; 2] {
        let inside = self.inside() as f64;
        let place = (rank - self.below_low) as f64 / inside;
        let margin = 1.5 / inside.sqrt();
        let at = |part: f64| self.clamp(i64::from(self.low) + (part * self.width() as f64) as i64);
        [at(place - margin), at(place + margin)]
    }

    fn thirds(self) -> [i32; 2] {
        let at = |part| self.clamp(i64::from(self.low) + self.width() * part / 3);
        [at(1), at(2)]
    }

    fn narrowed(self, pivots: [i32; 2], below: [usize; 2], rank: usize) -> Self {
        let mut bracket = self;
        for (pivot, below) in pivots.into_iter().zip(below) {
            if below <= rank && pivot > bracket.low {
                (bracket.low, bracket.below_low) = (pivot, below);
            } else if below > rank && pivot < bracket.high {
                (bracket.high, bracket.below_high) = (pivot, below);
            }
        }
        bracket
    }
}

/// The key with `rank` keys before it in ascending order; `rank` is less than their count.
pub fn threshold(keys: &mut impl Keys, rank: usize, scratch: &mut Vec<i32>) -> Threshold {
    let count = keys.count();
    // No key is i32::MAX.
    let mut bracket = Bracket { low: i32::MIN, high: i32::MAX, below_low: 0, below_high: count };
    if count > 4 * FEW {
        scratch.clear();
        keys.sample(scratch);
        scratch.sort_unstable();
        let place = (rank as f64 / count as f64 * scratch.len() as f64) as usize;
        let low = place.checked_sub(4).map_or(i32::MIN, |i| scratch[i]);
        let high = scratch.get(place + 4).copied().unwrap_or(i32::MAX);
        let pivots = [bracket.clamp(low.into()), bracket.clamp(high.into())];
        bracket = bracket.narrowed(pivots, keys.below(pivots), rank);
    }
    let mut slow = false;
    while bracket.inside() > FEW && bracket.width() > 1 {
        let pivots = if slow { bracket.thirds() } else { bracket.interpolated(rank) };
        let before = bracket.inside();
        bracket = bracket.narrowed(pivots, keys.below(pivots), rank);
        slow = !slow && bracket.inside() * 3 > before;
    }
    if bracket.width() == 1 {
        let Bracket { low: key, below_low: less, .. } = bracket;
        return Threshold { key, less, equal: bracket.inside() };
    }
    scratch.clear();
    keys.within(bracket.low, bracket.high, scratch);
    let (_, &mut key, _) = scratch.select_nth_unstable(rank - bracket.below_low);
    let [less, through] = below_kernel(scratch, [key, key + 1]);
    Threshold { key, less: bracket.below_low + less, equal: through - less }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &[i32]) {
        let mut sorted = keys.to_vec();
        sorted.sort_unstable();
        let mut scratch = Vec::new();
        let step = (keys.len() / 50).max(1);
        for rank in (0..keys.len()).step_by(step).chain([keys.len() - 1]) {
            let key = sorted[rank];
            let less = sorted.partition_point(|&other| other < key);
            let equal = sorted.partition_point(|&other| other <= key) - less;
            let found = threshold(&mut &*keys, rank, &mut scratch);
            assert_eq!(found, Threshold { key, less, equal }, "rank {rank} of {}", keys.len());
        }
    }

    #[test]
    fn finds_every_rank() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 1) as i32
        };
        for count in [1, 2, 47, 48, 49, 193, 500, 5000] {
            let random: Vec<i32> = (0..count).map(|_| next() % i32::MAX).collect();
            check(&random);
            check(&random.iter().map(|key| key % 3).collect::<Vec<_>>());
            check(&random.iter().map(|key| -(key >> 3)).collect::<Vec<_>>());
            check(&random.iter().map(|key| 1 << (key % 30)).collect::<Vec<_>>());
            check(&vec![0x7f80_0000; count]);
            check(&(0..count as i32).collect::<Vec<_>>());
            check(
                &(0..count as i32)
                    .map(|i| if i == 7 { 0 } else { i32::MIN + 1 })
                    .collect::<Vec<_>>(),
            );
        }
    }
}
