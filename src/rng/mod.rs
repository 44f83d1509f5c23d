//! Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011).
//!
//! # Dithers
//! A stochastic rounding decision is a pure function of (seed, stream, tensor id, step, element's
//! index), so it does not depend on threads, vector width, device, or sharding. The index `e` of
//! an element in its contiguous tensor is split as
//!
//! ```text
//! block = e / 256    lane = e % 32    half = (e % 256) / 32        (0 <= half < 8)
//! words = philox4x32(key, [low(32 * block + lane), high(32 * block + lane), tensor id, step])
//! dither = half-word `half` of the four words, the low half of a word first
//! ```
//!
//! One call serves eight elements with 16 bits each, and neighbouring lanes hold neighbouring
//! elements, so that vector code needs no transpose and a warp no shared memory. 16 bits let a
//! value move that lies only 1/131072 of a step off its grid; 8 bits would freeze small updates.

#[cfg(target_arch = "x86_64")]
mod x86;

use crate::cpu::simd::{self, Level};

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Elements that share a block of dithers.
pub const DITHER_BLOCK: usize = 256;
const LANES: usize = 32;

/// What random numbers are for; each use has its own stream, so that none repeats another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Stream {
    /// Rounding by the functional quantizer and of quantized weights.
    Quantize = 0,
    /// Rounding of bfloat16 values.
    Bfloat16 = 1,
    /// Gaussian test matrices of the randomized range finder.
    Sketch = 2,
}

/// Everything a random number depends on, besides the element's index. Laid out as the kernels' own.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Key {
    key: [u32; 2],
    tensor_id: u32,
    step: u32,
}

impl Key {
    pub fn new(seed: u64, stream: Stream, tensor_id: u32, step: u32) -> Self {
        // An odd multiplier keeps the map from seeds to keys one-to-one within a stream.
        let mixed = seed ^ (stream as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self { key: [mixed as u32, (mixed >> 32) as u32], tensor_id, step }
    }

    /// The part that depends on seed and stream only.
    pub fn seed_words(self) -> [u32; 2] {
        self.key
    }

    /// Tensor id and step.
    pub fn counter_words(self) -> (u32, u32) {
        (self.tensor_id, self.step)
    }

    /// The four words at `counter`.
    pub fn words(self, counter: u64) -> [u32; 4] {
        philox4x32([counter as u32, (counter >> 32) as u32, self.tensor_id, self.step], self.key)
    }
}

/// Philox4x32-10 of one counter.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..ROUNDS {
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(c[0]);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(c[2]);
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// One block of dithers; the reference of the vector code.
fn block_scalar(key: Key, block: u64, out: &mut [u16; DITHER_BLOCK]) {
    for lane in 0..LANES {
        let words = key.words(block * LANES as u64 + lane as u64);
        for (w, word) in words.into_iter().enumerate() {
            out[2 * w * LANES + lane] = word as u16;
            out[(2 * w + 1) * LANES + lane] = (word >> 16) as u16;
        }
    }
}

/// Fills `dithers` with those of the elements from `256 * first_block` on.
pub fn fill_dithers(key: Key, first_block: u64, dithers: &mut [u16]) {
    let level = simd::level();
    let fill = |block: u64, out: &mut [u16; DITHER_BLOCK]| match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level in use is available on this processor.
        Level::Avx512 => unsafe { x86::block_avx512(key, block, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::block_avx2(key, block, out) },
        _ => block_scalar(key, block, out),
    };
    let (whole, rest) = dithers.as_chunks_mut::<DITHER_BLOCK>();
    let after = first_block + whole.len() as u64;
    for (block, out) in (first_block..).zip(whole) {
        fill(block, out);
    }
    if !rest.is_empty() {
        let mut last = [0u16; DITHER_BLOCK];
        fill(after, &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (`philox4x32 10`).
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32(counter, key), want);
        }
    }

    #[test]
    fn dithers_follow_the_documented_layout_beyond_32_bits() {
        let key = Key::new(7, Stream::Quantize, 3, 5);
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            simd::set_level(level);
            check_layout(key);
        }
        simd::set_level(Level::best());
    }

    fn check_layout(key: Key) {
        for first_block in [0, 1, (1 << 27) - 1, 1 << 27, 1 << 40] {
            let mut dithers = [0u16; 600];
            fill_dithers(key, first_block, &mut dithers);
            for (i, &dither) in dithers.iter().enumerate() {
                let (block, rest) = (first_block + i as u64 / 256, i % 256);
                let words = key.words(block * 32 + (rest % 32) as u64);
                let (half, word) = (rest / 32 % 2, words[rest / 64]);
                assert_eq!(dither, (word >> (16 * half)) as u16, "block {first_block}, {i}");
            }
        }
    }

    #[test]
    fn streams_differ() {
        let words = |s| Key::new(1, s, 0, 0).words(0);
        assert_ne!(words(Stream::Quantize), words(Stream::Bfloat16));
        assert_ne!(words(Stream::Quantize), words(Stream::Sketch));
    }
}
