//! The 4-bit maps of optimizer states: for first moments the dynamic map with three exponent bits
//! (Dettmers et al. 2021, arXiv 2110.02861), for second moments sixteenths without zero (Li et al.
//! 2023, arXiv 2309.01507), so that no small second moment stands for a step without bound.

use super::block_scale;
use crate::multiversion;

const SIGNED: [f32; 16] = [
    -0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0, 0.0055, 0.0325, 0.0775,
    0.2125, 0.4375, 0.6625, 0.8875, 1.0,
];
/// Code of zero in the map of first moments. In the other one code 0 stands for zero in a block
/// whose scale is zero, as every code does.
pub const SIGNED_ZERO: u8 = 7;

const MIDDLES: [f32; 15] = {
    let mut middles = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middles[i] = (SIGNED[i] + SIGNED[i + 1]) / 2.0;
        i += 1;
    }
    middles
};

#[inline(always)]
fn encode_kernel(values: &[f32], inverse: f32, signed: bool, codes: &mut [u8]) {
    if signed {
        for (&value, code) in values.iter().zip(codes) {
            let x = value * inverse;
            *code = MIDDLES.iter().map(|&middle| u8::from(x > middle)).sum();
        }
    } else {
        for (&value, code) in values.iter().zip(codes) {
            let steps = (value * inverse * 16.0 - 0.5).clamp(0.0, 15.0);
            // SAFETY: from 0 to 15.
            *code = unsafe { steps.to_int_unchecked::<i32>() } as u8;
        }
    }
}

multiversion! {
    /// The codes nearest to `values * inverse`.
    fn encode(values: &[f32], inverse: f32, signed: bool, codes: &mut [u8]) = encode_kernel
}

/// Encodes a block of finite values, a code in each byte; returns its scale.
pub fn encode_block(values: &[f32], signed: bool, codes: &mut [u8]) -> f32 {
    let (scale, inverse) = block_scale(values);
    encode(values, inverse, signed, codes);
    scale
}

#[inline(always)]
fn decode_kernel(codes: &[u8], scale: f32, signed: bool, values: &mut [f32]) {
    if signed {
        for (&code, value) in codes.iter().zip(values) {
            *value = SIGNED[usize::from(code & 15)] * scale;
        }
    } else {
        for (&code, value) in codes.iter().zip(values) {
            *value = (i32::from(code & 15) + 1) as f32 * (1.0 / 16.0) * scale;
        }
    }
}

multiversion! {
    /// The values behind codes, a code in each byte.
    pub fn decode_block(codes: &[u8], scale: f32, signed: bool, values: &mut [f32]) = decode_kernel
}
