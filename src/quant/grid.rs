//! The integer grid of a group: its range, its scale, and rounding onto it.

use crate::error::Result;
use crate::tensor::Check;

/// Adding and subtracting 1.5 * 2^23 rounds a float below 2^22 to the nearest even integer, which
/// then stands in the low bits. Unlike a conversion it is one addition on every processor.
const MAGIC: f32 = 12_582_912.0;
/// The magnitude, in 65536ths of a step, over 2^21 is how far off its grid a value may be by
/// rounding alone: what dequantizing, deriving the scale again and dividing lose together is below
/// 6 * 2^-24 of it.
const ON_GRID_SHIFT: u32 = 21;
const DITHER_STEPS: f32 = 65_536.0;

/// How codes are laid out and rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    pub bits: u8,
    pub symmetric: bool,
}

impl Format {
    pub fn new(check: Check, bits: u8, symmetric: bool) -> Result<Self> {
        check.value("bits", bits == 4 || bits == 8, "4 or 8", bits)?;
        Ok(Self { bits, symmetric })
    }

    /// The lowest and the highest code.
    #[inline(always)]
    pub fn limits(self) -> (i32, i32) {
        if self.symmetric {
            let high = (1 << (self.bits - 1)) - 1;
            (-high, high)
        } else {
            (0, (1 << self.bits) - 1)
        }
    }

    /// What is added to a code before it is stored in a nibble.
    #[inline(always)]
    pub fn nibble_offset(self) -> i32 {
        if self.symmetric { 8 } else { 0 }
    }
}

/// The grid of one group: `value = (code - zero_point) * scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    pub scale: f32,
    pub zero_point: i32,
}

/// Extremes of a group, zero included, and whether they are all there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    pub low: f32,
    pub high: f32,
    pub finite: bool,
}

impl Range {
    /// Compares bit patterns, which is two operations a value and lets no NaN slip through: as a
    /// signed integer a pattern grows with a positive value, as an unsigned one with a negative
    /// value's distance from zero, and NaNs of either sign lie beyond the infinities.
    #[inline(always)]
    pub fn of(x: &[f32]) -> Self {
        let (mut highest, mut lowest) = (0i32, 0u32);
        for &value in x {
            highest = highest.max(value.to_bits() as i32);
            lowest = lowest.max(value.to_bits());
        }
        let high = f32::from_bits(highest as u32);
        // Without a negative value the largest pattern is that of a positive one.
        let low = if lowest >> 31 == 1 { f32::from_bits(lowest) } else { 0.0 };
        Self { low, high, finite: low.is_finite() && high.is_finite() }
    }
}

impl Grid {
    /// The finest grid that covers `range`.
    #[inline(always)]
    pub fn covering(range: Range, format: Format) -> Self {
        let (low_code, high_code) = format.limits();
        let steps = (high_code - low_code) as f32;
        let scale = if format.symmetric {
            range.high.max(-range.low) / high_code as f32
        } else {
            // Dividing first keeps the difference of huge extremes finite.
            range.high / steps - range.low / steps
        };
        if scale == 0.0 && range.low == 0.0 && range.high == 0.0 {
            return Self { scale: 1.0, zero_point: 0 };
        }
        // Below this the inverse overflows; such a coarse grid still resolves to 1e-38.
        let scale = scale.max(f32::MIN_POSITIVE);
        let zero_point =
            if format.symmetric { 0 } else { (nearest(-range.low / scale)).clamp(0, high_code) };
        Self { scale, zero_point }
    }
}

/// Round half to even, for magnitudes below 2^22.
#[inline(always)]
pub fn nearest(x: f32) -> i32 {
    (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// Rounds finite `x` onto `grid` and stores the codes' low bytes.
#[inline(always)]
pub fn round_nearest(x: &[f32], grid: Grid, format: Format, codes: &mut [u8]) {
    let (low, high) = format.limits();
    let inverse = 1.0 / grid.scale;
    for (&value, code) in x.iter().zip(codes) {
        *code = (nearest(value * inverse) + grid.zero_point).max(low).min(high) as u8;
    }
}

/// Rounds finite `x` onto `grid` up or down, up with the probability that keeps the mean.
///
/// A value counts in 65536ths of a step; the dither is added and the fraction dropped. Dividing by
/// a rounded scale leaves a value that lies on the grid a little off it, so dithers keep that far
/// away from both ends: such a value is never moved.
#[inline(always)]
pub fn round_stochastic(x: &[f32], dithers: &[u16], grid: Grid, format: Format, codes: &mut [u8]) {
    let (low, high) = format.limits();
    let inverse = 1.0 / grid.scale;
    for ((&value, &dither), code) in x.iter().zip(dithers).zip(codes) {
        let parts = value * inverse * DITHER_STEPS;
        // SAFETY: a finite value on a grid that covers it lies within 255 steps of zero.
        let parts = unsafe { parts.round_ties_even().to_int_unchecked::<i32>() };
        let slack = parts.abs() >> ON_GRID_SHIFT;
        let dither = i32::from(dither).max(slack).min(0xffff - slack);
        let steps = (parts + dither) >> 16;
        *code = (steps + grid.zero_point).max(low).min(high) as u8;
    }
}

/// The values behind `codes`.
#[inline(always)]
pub fn dequantize(codes: &[u8], grid: Grid, symmetric: bool, values: &mut [f32]) {
    if symmetric {
        for (&code, value) in codes.iter().zip(values) {
            *value = f32::from(code as i8) * grid.scale;
        }
    } else {
        for (&code, value) in codes.iter().zip(values) {
            *value = (i32::from(code) - grid.zero_point) as f32 * grid.scale;
        }
    }
}

/// Replaces what is not finite: NaN by zero, the infinities by the extremes of the finite values.
///
/// Returns how many values were replaced.
pub fn sanitize(x: &mut [f32]) -> usize {
    let (mut low, mut high) = (0f32, 0f32);
    for &value in x.iter().filter(|value| value.is_finite()) {
        low = low.min(value);
        high = high.max(value);
    }
    let mut replaced = 0;
    for value in x.iter_mut().filter(|value| !value.is_finite()) {
        *value = if value.is_nan() { 0.0 } else { value.clamp(low, high) };
        replaced += 1;
    }
    replaced
}
