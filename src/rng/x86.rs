//! Dithers in vector code, bit for bit those of the scalar path.
//!
//! A counter's words lie in the low halves of 64-bit lanes, where the widening product takes them
//! and leaves them: what stands in the high halves never matters, so a round needs no shuffles.
//! Even and odd lanes are kept apart until the words are complete.

use std::arch::x86_64::*;

use super::{DITHER_BLOCK, Key, LANES, MULTIPLIER, ROUNDS, WEYL};

/// One block of dithers.
#[target_feature(enable = "avx512f,avx512bw")]
pub fn block_avx512(key: Key, block: u64, out: &mut [u16; DITHER_BLOCK]) {
    let counter = block * LANES as u64;
    let m0 = _mm512_set1_epi64(i64::from(MULTIPLIER[0]));
    let m1 = _mm512_set1_epi64(i64::from(MULTIPLIER[1]));
    let word = |value: u32| _mm512_set1_epi32(value as i32);
    let even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    let first = _mm512_add_epi64(_mm512_set1_epi64(i64::from(counter as u32)), even);
    // Lanes 0, 2, ... 14, then 1, 3, ... 15, then the same from 16 on.
    let start = |lane: i64| {
        let low = _mm512_add_epi64(first, _mm512_set1_epi64(lane));
        [low, word((counter >> 32) as u32), word(key.tensor_id), word(key.step)]
    };
    let mut state = [start(0), start(1), start(16), start(17)];
    let mut k = key.key;
    for _ in 0..ROUNDS {
        let (k0, k1) = (word(k[0]), word(k[1]));
        for c in &mut state {
            let p0 = _mm512_mul_epu32(c[0], m0);
            let p1 = _mm512_mul_epu32(c[2], m1);
            // 0x96: the exclusive or of all three.
            *c = [
                _mm512_ternarylogic_epi32::<0x96>(_mm512_srli_epi64::<32>(p1), c[1], k0),
                p1,
                _mm512_ternarylogic_epi32::<0x96>(_mm512_srli_epi64::<32>(p0), c[3], k1),
                p0,
            ];
        }
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    let mut index = [0u16; 32];
    for (i, index) in index.iter_mut().enumerate() {
        *index = 2 * i as u16;
    }
    // SAFETY: the array has 64 bytes.
    let low_halves = unsafe { _mm512_loadu_si512(index.as_ptr().cast()) };
    let high_halves = _mm512_or_si512(low_halves, _mm512_set1_epi16(1));
    let [even0, odd0, even1, odd1] = state;
    for (w, out) in out.chunks_exact_mut(2 * LANES).enumerate() {
        let front = _mm512_mask_shuffle_epi32::<0xA0>(even0[w], 0xAAAA, odd0[w]);
        let back = _mm512_mask_shuffle_epi32::<0xA0>(even1[w], 0xAAAA, odd1[w]);
        let low = _mm512_permutex2var_epi16(front, low_halves, back);
        let high = _mm512_permutex2var_epi16(front, high_halves, back);
        // SAFETY: `out` has 64 elements, 128 bytes.
        unsafe {
            _mm512_storeu_si512(out.as_mut_ptr().cast(), low);
            _mm512_storeu_si512(out.as_mut_ptr().add(LANES).cast(), high);
        }
    }
}

/// The four words of eight consecutive counters, of which the first is even.
#[target_feature(enable = "avx2")]
#[inline]
fn words_avx2(key: Key, counter: u64) -> [__m256i; 4] {
    let m0 = _mm256_set1_epi64x(i64::from(MULTIPLIER[0]));
    let m1 = _mm256_set1_epi64x(i64::from(MULTIPLIER[1]));
    let word = |value: u32| _mm256_set1_epi32(value as i32);
    let even = _mm256_setr_epi64x(0, 2, 4, 6);
    let first = _mm256_add_epi64(_mm256_set1_epi64x(i64::from(counter as u32)), even);
    let start = |lane: i64| {
        let low = _mm256_add_epi64(first, _mm256_set1_epi64x(lane));
        [low, word((counter >> 32) as u32), word(key.tensor_id), word(key.step)]
    };
    let mut state = [start(0), start(1)];
    let mut k = key.key;
    for _ in 0..ROUNDS {
        let (k0, k1) = (word(k[0]), word(k[1]));
        for c in &mut state {
            let p0 = _mm256_mul_epu32(c[0], m0);
            let p1 = _mm256_mul_epu32(c[2], m1);
            // The keys first: they do not wait for the products.
            *c = [
                _mm256_xor_si256(_mm256_srli_epi64::<32>(p1), _mm256_xor_si256(c[1], k0)),
                p1,
                _mm256_xor_si256(_mm256_srli_epi64::<32>(p0), _mm256_xor_si256(c[3], k1)),
                p0,
            ];
        }
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    let [even, odd] = state;
    let merge = |w: usize| _mm256_blend_epi32::<0xAA>(even[w], _mm256_slli_epi64::<32>(odd[w]));
    [merge(0), merge(1), merge(2), merge(3)]
}

/// One block of dithers.
#[target_feature(enable = "avx2")]
pub fn block_avx2(key: Key, block: u64, out: &mut [u16; DITHER_BLOCK]) {
    const STEP: usize = 16;
    let low_half = _mm256_set1_epi32(0xffff);
    for base in (0..LANES).step_by(STEP) {
        let counter = block * LANES as u64 + base as u64;
        let (front, back) = (words_avx2(key, counter), words_avx2(key, counter + 8));
        for (w, out) in out.chunks_exact_mut(2 * LANES).enumerate() {
            // Packing works on halves of a register; the permutation puts these in order.
            let pack = |a, b| _mm256_permute4x64_epi64::<0xD8>(_mm256_packus_epi32(a, b));
            let low =
                pack(_mm256_and_si256(front[w], low_half), _mm256_and_si256(back[w], low_half));
            let high = pack(_mm256_srli_epi32::<16>(front[w]), _mm256_srli_epi32::<16>(back[w]));
            // SAFETY: `out` has 64 elements, and `base` is at most 16.
            unsafe {
                _mm256_storeu_si256(out.as_mut_ptr().add(base).cast(), low);
                _mm256_storeu_si256(out.as_mut_ptr().add(LANES + base).cast(), high);
            }
        }
    }
}
