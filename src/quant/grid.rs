//! The integer grid of a group: its range, its scale, and rounding onto it.

use crate::error::Result;
use crate::tensor::Check;

/// Adding and subtracting 1.5 * 2^23 rounds a float below 2^22 to the nearest even integer, which
/// then stands in the low bits. Unlike a conversion it is one addition on every processor.
const MAGIC: f32 = 12_582_912.0;
/// A value this close to a grid point, relative to its distance from zero in steps, is on it:
/// what dequantizing, deriving the scale again and dividing lose together is below 6 * 2^-24.
const ON_GRID: f32 = 1.0 / 2_097_152.0;
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

/// Orders floats as integers: NaNs of either sign lie beyond the infinities.
#[inline(always)]
fn order(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) & i32::MAX)
}

#[inline(always)]
fn unorder(key: i32) -> f32 {
    f32::from_bits((key ^ ((key >> 31) & i32::MAX)) as u32)
}

impl Range {
    #[inline(always)]
    pub fn of(x: &[f32]) -> Self {
        let (mut low, mut high) = (0, 0);
        for &value in x {
            let key = order(value);
            low = low.min(key);
            high = high.max(key);
        }
        let (low, high) = (unorder(low), unorder(high));
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
        *code = (nearest(value * inverse) + grid.zero_point).clamp(low, high) as u8;
    }
}

/// Rounds finite `x` onto `grid` up or down, up with the probability that keeps the mean.
#[inline(always)]
pub fn round_stochastic(x: &[f32], dithers: &[u16], grid: Grid, format: Format, codes: &mut [u8]) {
    let (low, high) = format.limits();
    let inverse = 1.0 / grid.scale;
    for ((&value, &dither), code) in x.iter().zip(dithers).zip(codes) {
        let steps = value * inverse;
        let whole = (steps + MAGIC) - MAGIC;
        let rest = steps - whole;
        let rest = if rest.abs() <= steps.abs() * ON_GRID { 0.0 } else { rest };
        let up = (nearest(rest * DITHER_STEPS) + i32::from(dither)) >> 16;
        *code = (nearest(steps) + up + grid.zero_point).clamp(low, high) as u8;
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
