// Codes of 8 bits, or of 4 bits two to the byte, the first in the low nibble.
#pragma once

#include "element.cuh"

// The four codes from `element` on, a multiple of four, in one word, the first lowest; zero beyond
// `left`.
template <int BITS>
__device__ __forceinline__ u32 load_codes(const u8* codes, i64 element, int left) {
    u32 word = 0;
    if constexpr (BITS == 8) {
        const u8* const at = codes + element;
        if (left >= 4 && is_aligned<u32>(at)) return *reinterpret_cast<const u32*>(at);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j < left) word |= u32(at[j]) << 8 * j;
    } else {
        const u8* const at = codes + element / 2;
        if (left >= 3 && is_aligned<u16>(at)) return *reinterpret_cast<const u16*>(at);
        if (left > 0) word = at[0];
        if (left > 2) word |= u32(at[1]) << 8;
    }
    return word;
}

template <int BITS>
__device__ __forceinline__ u32 code_of(u32 word, int j) {
    return word >> BITS * j & ((1 << BITS) - 1);
}

// Stores the low BITS of each code; of a last byte that has one code the high nibble is zero.
template <int BITS>
__device__ __forceinline__ void store_codes(u8* codes, i64 element, int left,
                                            const u32 (&values)[4]) {
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (j < left) word |= (values[j] & ((1 << BITS) - 1)) << BITS * j;
    if constexpr (BITS == 8) {
        u8* const at = codes + element;
        if (left >= 4 && is_aligned<u32>(at)) {
            *reinterpret_cast<u32*>(at) = word;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < left) at[j] = u8(word >> 8 * j);
        }
    } else {
        u8* const at = codes + element / 2;
        if (left >= 3 && is_aligned<u16>(at)) {
            *reinterpret_cast<u16*>(at) = u16(word);
        } else {
            if (left > 0) at[0] = u8(word);
            if (left > 2) at[1] = u8(word >> 8);
        }
    }
}

__device__ __forceinline__ u32 load_code(const u8* codes, i64 element, int bits) {
    if (bits == 8) return codes[element];
    return codes[element / 2] >> 4 * (element % 2) & 15;
}

// Stores one code of each thread; the threads of a warp have neighbouring elements, the first one
// an even one, and all of them come here, with `here` where there is something to store. Nibbles
// meet in the even thread, after both threads have read what they need of the byte.
__device__ __forceinline__ void store_code(u8* codes, i64 element, bool here, u32 code, int bits) {
    if (bits == 8) {
        if (here) codes[element] = u8(code);
        return;
    }
    const u32 nibble = here ? code & 15 : 0;
    const u32 next = __shfl_xor_sync(0xffff'ffff, nibble, 1);
    if (here && element % 2 == 0) codes[element / 2] = u8(nibble | next << 4);
}
