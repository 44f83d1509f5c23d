//! The dynamic maps of optimizer states; those of 8 bits are bitsandbytes' (Dettmers et al. 2021,
//! arXiv 2110.02861).
//!
//! Seven decades below 1 hold ever fewer entries, evenly spaced inside each: small values keep a
//! small relative error. The signed map serves first moments, the unsigned one second moments.

pub mod codec;
mod four;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{self, Level};
use crate::multiversion;

const DECADES: usize = 7;

/// What it takes to find the entry nearest to a magnitude by plain arithmetic, as vector code can.
///
/// The entries below 1 come in decades, evenly spaced inside each; the entry 1 is a decade of its
/// own, and so is zero, the first. A magnitude above `from[d - 1]`, but not above `from[d]`, is
/// nearest to entry `trunc(min(magnitude * slope[d] + offset[d], cap[d]))`, counted from zero, and
/// at least to entry 1 where d > 0. The rounding of the product and the sum decides values within
/// about 1e-5 of the spacing from the middle between two entries.
struct Decades {
    from: [f32; DECADES + 1],
    slope: [f32; 16],
    offset: [f32; 16],
    cap: [f32; 16],
    /// For each binade from 2^-31 to 1, everything below included in the first: where in it a
    /// decade begins, and how many begin below.
    binade_from: [f32; 32],
    binade_decade: [i32; 32],
}

/// A map from codes to values in [-1, 1], and back.
pub struct Map {
    pub values: [f32; 256],
    /// The values byte by byte, the lowest first.
    #[cfg(target_arch = "x86_64")]
    planes: [[u8; 256]; 4],
    /// Code of zero.
    pub zero: u8,
    signed: bool,
    decades: Decades,
}

static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

/// The map of first moments when `signed`, of second moments otherwise.
pub fn map(signed: bool) -> &'static Map {
    if signed { &SIGNED } else { &UNSIGNED }
}

/// Entries of a decade below 1.
const fn entries(signed: bool, decade: usize) -> usize {
    1 << (decade + if signed { 0 } else { 1 })
}

/// Interval middles of the decades, zero and one, in increasing order.
fn magnitudes(signed: bool) -> Vec<f32> {
    let mut result = vec![0.0];
    for decade in 0..DECADES {
        let intervals = entries(signed, decade);
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
        let power = 10f64.powi(decade as i32 + 1 - DECADES as i32) as f32;
        for i in 0..intervals {
            result.push(power * ((boundary(i) + boundary(i + 1)) / 2.0));
        }
    }
    result.push(1.0);
    result
}

impl Decades {
    /// From the magnitudes in increasing order, zero first.
    fn new(magnitudes: &[f32], signed: bool) -> Self {
        let middle = |i: usize| (magnitudes[i - 1] + magnitudes[i]) / 2.0;
        let mut result = Self {
            from: [0.0; DECADES + 1],
            slope: [0.0; 16],
            offset: [0.0; 16],
            cap: [0.0; 16],
            binade_from: [f32::INFINITY; 32],
            binade_decade: [0; 32],
        };
        let mut first = 1;
        for d in 0..=DECADES {
            // A positive second moment never becomes zero: beside a first moment that is not zero
            // it would stand for a step without bound.
            let from = if d == 0 && !signed { 0.0 } else { middle(first) };
            result.from[d] = from;
            result.binade_from[binade(from)] = from;
            for decade in &mut result.binade_decade[binade(from) + 1..] {
                *decade += 1;
            }
            let count = if d < DECADES { entries(signed, d) } else { 1 };
            result.cap[d + 1] = (first + count - 1) as f32;
            result.offset[d + 1] = first as f32;
            if d < DECADES {
                let power = 10f64.powi((DECADES - 1 - d) as i32);
                result.slope[d + 1] = (count as f64 * power / 0.9) as f32;
                result.offset[d + 1] = (first as f64 - count as f64 / 9.0) as f32;
            }
            first += count;
        }
        result
    }
}

/// The place of a magnitude's binade in a table.
fn binade(magnitude: f32) -> usize {
    ((magnitude.to_bits() >> 23).clamp(96, 127) - 96) as usize
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
        Self {
            values,
            #[cfg(target_arch = "x86_64")]
            planes: std::array::from_fn(|byte| values.map(|v| v.to_le_bytes()[byte])),
            zero,
            signed,
            decades: Decades::new(&positive, signed),
        }
    }

    /// The code of the entry nearest to `x`, up to 1 in magnitude.
    fn encode(&self, x: f32) -> u8 {
        let Decades { from, slope, offset, cap, .. } = &self.decades;
        let magnitude = x.abs();
        let decade = from.iter().filter(|&&from| magnitude > from).count();
        let place = (magnitude * slope[decade] + offset[decade]).min(cap[decade]) as i32;
        let place = place.max(i32::from(decade > 0));
        // The signed map has no -1.
        let place = if self.signed && x < 0.0 { -place.min(127) } else { place };
        (i32::from(self.zero) + place) as u8
    }

    /// The values behind the codes of a block.
    pub fn decode_block(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if simd::level() == Level::Avx512 && is_x86_feature_detected!("avx512vbmi") {
            // SAFETY: the level in use and the feature are available on this processor.
            return unsafe { x86::decode_vbmi(self, codes, scale, values) };
        }
        self.decode_each(codes, scale, values);
    }

    fn decode_each(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (&code, value) in codes.iter().zip(values) {
            *value = self.values[usize::from(code)] * scale;
        }
    }

    /// Encodes a block of finite values; returns its scale, the largest magnitude.
    pub fn encode_block(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let (scale, inverse) = block_scale(values);
        #[cfg(target_arch = "x86_64")]
        match simd::level() {
            Level::Avx512 => {
                // SAFETY: the level in use is available on this processor.
                unsafe { x86::encode_avx512(self, values, inverse, codes) };
                return scale;
            }
            Level::Avx2 => {
                // SAFETY: as above.
                unsafe { x86::encode_avx2(self, values, inverse, codes) };
                return scale;
            }
            Level::Scalar => {}
        }
        self.encode_each(values, inverse, codes);
        scale
    }

    fn encode_each(&self, values: &[f32], inverse: f32, codes: &mut [u8]) {
        for (&value, code) in values.iter().zip(codes) {
            *code = self.encode(value * inverse);
        }
    }
}

#[inline(always)]
fn largest_kernel(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff)))
}

multiversion! {
    /// The largest magnitude of finite values.
    fn largest(values: &[f32]) -> f32 = largest_kernel
}

/// The scale of a block, and what its values are multiplied with to lie in [-1, 1].
fn block_scale(values: &[f32]) -> (f32, f32) {
    let scale = largest(values);
    // A scale whose inverse overflows would turn zeros into NaNs.
    if scale >= f32::MIN_POSITIVE { (scale, 1.0 / scale) } else { (0.0, 0.0) }
}
