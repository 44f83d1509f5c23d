//! The dynamic maps in vector code, bit for bit the scalar path.

use std::arch::x86_64::*;

use super::{Decades, Map};

/// Codes to values: the four bytes of an entry are looked up one by one, 64 codes at a time, in
/// tables of 256 bytes that lie in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub fn decode_vbmi(map: &Map, codes: &[u8], scale: f32, values: &mut [f32]) {
    let (whole, rest) = codes.as_chunks::<64>();
    let (out, out_rest) = values.as_chunks_mut::<64>();
    let mut tables = [[_mm512_setzero_si512(); 4]; 4];
    for (table, plane) in tables.iter_mut().zip(&map.planes) {
        for (part, bytes) in table.iter_mut().zip(plane.as_chunks::<64>().0) {
            // SAFETY: `bytes` has 64 elements.
            *part = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
        }
    }
    // Interleaving works within quarters of a register: quads of codes are dealt out to these so
    // that they come back in order.
    let deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let scales = _mm512_set1_ps(scale);
    for (codes, out) in whole.iter().zip(out) {
        // SAFETY: `codes` has 64 bytes.
        let index = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        let index = _mm512_permutexvar_epi32(deal, index);
        let upper = _mm512_movepi8_mask(index);
        let mut bytes = [_mm512_setzero_si512(); 4];
        for (bytes, [a, b, c, d]) in bytes.iter_mut().zip(tables) {
            let low = _mm512_permutex2var_epi8(a, index, b);
            let high = _mm512_permutex2var_epi8(c, index, d);
            *bytes = _mm512_mask_blend_epi8(upper, low, high);
        }
        let front =
            [_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpacklo_epi8(bytes[2], bytes[3])];
        let back =
            [_mm512_unpackhi_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[2], bytes[3])];
        let quarters = [
            _mm512_unpacklo_epi16(front[0], front[1]),
            _mm512_unpackhi_epi16(front[0], front[1]),
            _mm512_unpacklo_epi16(back[0], back[1]),
            _mm512_unpackhi_epi16(back[0], back[1]),
        ];
        for (quarter, out) in quarters.into_iter().zip(out.as_chunks_mut::<16>().0) {
            let value = _mm512_mul_ps(_mm512_castsi512_ps(quarter), scales);
            // SAFETY: `out` has 16 elements.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), value) };
        }
    }
    map.decode_each(rest, scale, out_rest);
}

/// Values times `inverse` to codes.
#[target_feature(enable = "avx512f,avx512dq")]
pub fn encode_avx512(map: &Map, values: &[f32], inverse: f32, codes: &mut [u8]) {
    let (whole, rest) = values.as_chunks::<16>();
    let (out, out_rest) = codes.as_chunks_mut::<16>();
    let Decades { slope, offset, cap, binade_from, binade_decade, .. } = &map.decades;
    // SAFETY: all have 16 or 32 elements.
    let load = |table: &[f32], i: usize| unsafe { _mm512_loadu_ps(table[16 * i..].as_ptr()) };
    let integers = |i: usize| {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(binade_decade[16 * i..].as_ptr().cast()) }
    };
    let (slope, offset, cap) = (load(slope, 0), load(offset, 0), load(cap, 0));
    let (from_low, from_high) = (load(binade_from, 0), load(binade_from, 1));
    let (decade_low, decade_high) = (integers(0), integers(1));
    let inverse_all = _mm512_set1_ps(inverse);
    let (one, lowest) = (_mm512_set1_epi32(1), _mm512_set1_epi32(96));
    let (sign, zero) = (_mm512_set1_ps(-0.0), _mm512_set1_epi32(i32::from(map.zero)));
    for (values, out) in whole.iter().zip(out) {
        // SAFETY: `values` has 16 elements.
        let x = _mm512_mul_ps(unsafe { _mm512_loadu_ps(values.as_ptr()) }, inverse_all);
        let magnitude = _mm512_andnot_ps(sign, x);
        let exponent = _mm512_srli_epi32::<23>(_mm512_castps_si512(magnitude));
        // Only the five low bits of this choose, and 96 has none of them set.
        let binade = _mm512_max_epi32(exponent, lowest);
        let from = _mm512_permutex2var_ps(from_low, binade, from_high);
        let below = _mm512_permutex2var_epi32(decade_low, binade, decade_high);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(magnitude, from);
        let decade = _mm512_mask_add_epi32(below, above, below, one);
        let pick = |table| _mm512_permutexvar_ps(decade, table);
        let place = _mm512_add_ps(_mm512_mul_ps(magnitude, pick(slope)), pick(offset));
        let place = _mm512_min_ps(place, pick(cap));
        let code = if map.signed {
            let place = _mm512_cvttps_epi32(_mm512_or_ps(place, _mm512_and_ps(sign, x)));
            // The signed map has no -1.
            _mm512_max_epi32(_mm512_add_epi32(place, zero), _mm512_setzero_si512())
        } else {
            let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(magnitude, _mm512_setzero_ps());
            _mm512_maskz_max_epi32(positive, _mm512_cvttps_epi32(place), one)
        };
        // SAFETY: `out` has 16 bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(code)) };
    }
    map.encode_each(rest, inverse, out_rest);
}

/// Values times `inverse` to codes.
#[target_feature(enable = "avx2")]
pub fn encode_avx2(map: &Map, values: &[f32], inverse: f32, codes: &mut [u8]) {
    let (whole, rest) = values.as_chunks::<32>();
    let (out, out_rest) = codes.as_chunks_mut::<32>();
    for (values, out) in whole.iter().zip(out) {
        let (quarters, _) = values.as_chunks::<8>();
        let code = |i: usize| codes_avx2(map, &quarters[i], inverse);
        let low = _mm256_packs_epi32(code(0), code(1));
        let high = _mm256_packs_epi32(code(2), code(3));
        // Packing works on halves of a register; the permutation puts the quarters in order.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        // SAFETY: `out` has 32 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), packed) };
    }
    map.encode_each(rest, inverse, out_rest);
}

#[target_feature(enable = "avx2")]
#[inline]
fn codes_avx2(map: &Map, values: &[f32; 8], inverse: f32) -> __m256i {
    let Decades { from, slope, offset, cap, .. } = &map.decades;
    let sign = _mm256_set1_ps(-0.0);
    // SAFETY: `values` has 8 elements.
    let values = unsafe { _mm256_loadu_ps(values.as_ptr()) };
    let x = _mm256_mul_ps(values, _mm256_set1_ps(inverse));
    let magnitude = _mm256_andnot_ps(sign, x);
    let above = |i: usize| {
        _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(magnitude, _mm256_set1_ps(from[i])))
    };
    // A comparison gives -1 where it holds; two chains, since each waits for the one before.
    let both = |a, b| _mm256_add_epi32(a, b);
    let odd = both(both(above(1), above(3)), both(above(5), above(7)));
    let even = both(both(above(2), above(4)), above(6));
    let decade = _mm256_sub_epi32(_mm256_setzero_si256(), both(odd, even));
    let pick = |table: &[f32; 16]| {
        // SAFETY: nine elements are in use; zero, the first, is masked below.
        let table = unsafe { _mm256_loadu_ps(table[1..].as_ptr()) };
        _mm256_permutevar8x32_ps(table, decade)
    };
    let place = _mm256_add_ps(_mm256_mul_ps(magnitude, pick(slope)), pick(offset));
    let place = _mm256_min_ps(place, pick(cap));
    if !map.signed {
        let code = _mm256_max_epi32(_mm256_cvttps_epi32(place), _mm256_set1_epi32(1));
        return _mm256_and_si256(code, above(0));
    }
    let place = _mm256_and_ps(place, _mm256_castsi256_ps(above(0)));
    let place = _mm256_cvttps_epi32(_mm256_or_ps(place, _mm256_and_ps(sign, x)));
    let zero = _mm256_set1_epi32(i32::from(map.zero));
    // The signed map has no -1.
    _mm256_max_epi32(_mm256_add_epi32(place, zero), _mm256_setzero_si256())
}
