//! The dynamic 8-bit maps of bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861).
//!
//! Seven decades below 1 hold ever fewer entries, evenly spaced inside each: small values keep a
//! small relative error. The signed map serves first moments, the unsigned one second moments.

use std::sync::LazyLock;

const DECADES: i32 = 7;
/// Upper halves of the floats from 0 to 1.
const BUCKETS: usize = 0x3f80 + 1;

/// A map from codes to values in [-1, 1], and what it takes to find the nearest entry.
pub struct Map {
    pub values: [f32; 256],
    /// Code of zero.
    pub zero: u8,
    /// Magnitudes in increasing order, with zero first.
    middles: [f32; 256],
    /// For the upper half of a magnitude's bits: how many middles lie below all of its bucket.
    /// A bucket is narrower than the distance of two middles, so one comparison decides.
    below: Vec<u8>,
    highest: u8,
    lowest_positive: u8,
    signed: bool,
}

pub static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
pub static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

/// Interval middles of the decades, zero and one, in increasing order.
fn magnitudes(signed: bool) -> Vec<f32> {
    let mut result = vec![0.0];
    for decade in 0..DECADES {
        let intervals = 1usize << if signed { decade } else { decade + 1 };
        let low = 0.1f32;
        let step = f64::from((1.0 - low) / intervals as f32);
        // From the nearer end and rounded once, which is how PyTorch spaces its boundaries.
        let boundary = |i: usize| {
            if i < intervals.div_ceil(2) {
                (f64::from(low) + step * i as f64) as f32
            } else {
                (1.0 - step * (intervals - i) as f64) as f32
            }
        };
        let power = 10f64.powi(decade + 1 - DECADES) as f32;
        for i in 0..intervals {
            result.push(power * ((boundary(i) + boundary(i + 1)) / 2.0));
        }
    }
    result.push(1.0);
    result
}

impl Map {
    fn new(signed: bool) -> Self {
        let positive = magnitudes(signed);
        let zero = if signed { 127u8 } else { 0 };
        let mut values = [0f32; 256];
        for (i, &value) in positive.iter().enumerate() {
            values[usize::from(zero) + i] = value;
            // The signed map has no -1: it is one entry short on that side.
            if signed && i < 128 {
                values[usize::from(zero) - i] = -value;
            }
        }
        let mut middles = [f32::INFINITY; 256];
        for (middle, pair) in middles.iter_mut().zip(positive.windows(2)) {
            *middle = (pair[0] + pair[1]) / 2.0;
        }
        let below = (0..BUCKETS)
            .map(|bucket| {
                let low = f32::from_bits((bucket as u32) << 16);
                middles.iter().take_while(|&&middle| middle < low).count() as u8
            })
            .collect();
        let highest = (positive.len() - 1) as u8;
        Self { values, zero, middles, below, highest, lowest_positive: u8::from(!signed), signed }
    }

    /// The code of the entry nearest to `x`, in [-1, 1]; a tie goes towards zero.
    ///
    /// A positive second moment never becomes zero: beside a first moment that is not zero it
    /// would stand for a step without bound.
    #[inline(always)]
    pub fn encode(&self, x: f32) -> u8 {
        let magnitude = x.abs();
        let bucket = ((magnitude.to_bits() >> 16) as usize).min(BUCKETS - 1);
        let below = self.below[bucket];
        let index = below + u8::from(magnitude > self.middles[usize::from(below)]);
        let index = index.min(self.highest);
        if self.signed {
            if x < 0.0 { self.zero - index.min(127) } else { self.zero + index }
        } else if magnitude > 0.0 {
            index.max(self.lowest_positive)
        } else {
            0
        }
    }

    /// The values behind the codes of a block.
    #[inline(always)]
    pub fn decode_block(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (&code, value) in codes.iter().zip(values) {
            *value = self.values[usize::from(code)] * scale;
        }
    }

    /// Encodes a block of finite values; returns its scale, the largest magnitude.
    #[inline(always)]
    pub fn encode_block(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let largest = values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
        let scale = f32::from_bits(largest);
        // A scale whose inverse overflows would turn zeros into NaNs.
        let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        for (&value, code) in values.iter().zip(codes) {
            *code = self.encode(value * inverse);
        }
        if inverse == 0.0 { 0.0 } else { scale }
    }
}

/// The map of first moments when `signed`, of second moments otherwise.
pub fn map(signed: bool) -> &'static Map {
    if signed { &SIGNED } else { &UNSIGNED }
}
