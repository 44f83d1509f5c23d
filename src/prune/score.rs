//! How much a weight matters, in float32, and the same as integers that sort alike.

use half::f16;

use crate::multiversion;
use crate::tensor::Float;

/// Elements that are scored at once, so that their buffers stay in the first-level cache.
const SPAN: usize = 2048;

/// The key of an infinite score, and of one that is not a number: those weights are kept.
pub const INFINITY: i32 = 0x7f80_0000;

/// Which function of a weight, its column and its gradient the score is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The given values themselves, of either sign.
    Given,
    /// `|w|`, times the column's scale and the weighted gradient where there are any.
    Weight,
    /// The same as the papers' code computes it: the gradient's product rounded to float16.
    Half,
}

/// Everything that stays the same over a call.
#[derive(Clone, Copy)]
pub struct Score<'a> {
    pub kind: Kind,
    pub columns: usize,
    /// One factor for each column; empty for none.
    pub scale: &'a [f32],
    /// One value for each weight; empty for none.
    pub grad: &'a [f32],
    pub alpha: f32,
}

fn round_half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

#[inline(always)]
fn combine_kernel(score: Score<'_>, scale: &[f32], grad: &[f32], values: &mut [f32]) {
    let alpha = score.alpha;
    match (score.kind, scale.is_empty(), grad.is_empty()) {
        (Kind::Given, ..) => {}
        (_, true, true) => values.iter_mut().for_each(|value| *value = value.abs()),
        (_, false, true) => {
            for (value, scale) in values.iter_mut().zip(scale) {
                *value = value.abs() * scale;
            }
        }
        (Kind::Weight, true, false) => {
            for (value, grad) in values.iter_mut().zip(grad) {
                *value = value.abs() * (alpha * grad.abs());
            }
        }
        (Kind::Weight, false, false) => {
            for ((value, scale), grad) in values.iter_mut().zip(scale).zip(grad) {
                *value = value.abs() * (scale + alpha * grad.abs());
            }
        }
        (Kind::Half, no_scale, _) => {
            for (i, (value, grad)) in values.iter_mut().zip(grad).enumerate() {
                let weight = value.abs();
                let product = round_half(round_half(weight) * round_half(grad.abs()));
                *value = if no_scale { product } else { weight * scale[i] + product };
            }
        }
    }
}

multiversion! {
    /// Turns weights into scores, in place.
    fn combine(score: Score<'_>, scale: &[f32], grad: &[f32], values: &mut [f32]) = combine_kernel
}

#[inline(always)]
fn keys_kernel(signed: bool, values: &[f32], keys: &mut [i32]) -> usize {
    let mut nan = 0u32;
    for (value, key) in values.iter().zip(keys) {
        let bits = value.to_bits() as i32;
        let magnitude = bits & i32::MAX;
        nan += u32::from(magnitude > INFINITY);
        let negative = signed && bits < 0 && magnitude <= INFINITY;
        // Both zeros get the key 0.
        *key = if negative { -magnitude } else { magnitude.min(INFINITY) };
    }
    nan as usize
}

multiversion! {
    /// Integers in the order of the values; returns how many are not a number.
    fn keys_of_values(signed: bool, values: &[f32], keys: &mut [i32]) -> usize = keys_kernel
}

impl<'a> Score<'a> {
    /// Calls `use_scores` with the scores of consecutive weights from `first` on, span by span,
    /// each with its place among `weights`.
    pub fn for_spans<T: Float>(
        self,
        weights: &[T],
        first: usize,
        buffer: &mut Vec<f32>,
        mut use_scores: impl FnMut(usize, &mut [f32]),
    ) {
        buffer.resize(SPAN.min(weights.len()), 0.0);
        let mut done = 0;
        while done < weights.len() {
            let element = first + done;
            let column = element % self.columns;
            let count = SPAN.min(weights.len() - done).min(self.columns - column);
            let values = &mut buffer[..count];
            T::widen(&weights[done..done + count], values);
            let part = |all: &'a [f32], from: usize| {
                if all.is_empty() { all } else { &all[from..from + count] }
            };
            combine(self, part(self.scale, column), part(self.grad, element), values);
            use_scores(done, values);
            done += count;
        }
    }

    /// The keys of consecutive weights from `first` on; returns how many scores are not a number.
    pub fn keys<T: Float>(
        self,
        weights: &[T],
        first: usize,
        buffer: &mut Vec<f32>,
        keys: &mut [i32],
    ) -> usize {
        let signed = self.kind == Kind::Given;
        let mut nan = 0;
        self.for_spans(weights, first, buffer, |place, values| {
            nan += keys_of_values(signed, values, &mut keys[place..place + values.len()]);
        });
        nan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_as_the_values() {
        let values = [f32::NEG_INFINITY, -2.0, -1e-45, -0.0, 0.0, 1e-45, 3.0, f32::INFINITY];
        let mut keys = [0; 8];
        assert_eq!(keys_of_values(true, &values, &mut keys), 0);
        assert!(keys.is_sorted());
        assert_eq!(keys[3], keys[4]);
        let odd = [f32::NAN, -f32::NAN, f32::INFINITY];
        let mut keys = [0; 3];
        assert_eq!(keys_of_values(true, &odd, &mut keys), 2);
        assert_eq!(keys, [INFINITY; 3]);
    }
}
