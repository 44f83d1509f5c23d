// The tensor cores' product of a 16 x 16 by a 16 x 8 matrix of halves, and what fills its operands.
// Halves are f16 or bf16; a function's `Half` argument only chooses between them.
#pragma once

#include "element.cuh"

#if defined(GRADPRESS_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define HAS_MMA 1
#else
#define HAS_MMA 0 // sm_75 has smaller products only, and none of bfloat16
#endif

#if HAS_MMA

// Two halves in a word, the first in the low bits, each rounded to nearest even.
__device__ __forceinline__ u32 pack_halves(bf16, float first, float second) {
#ifdef GRADPRESS_EMULATOR
    return u32(cuemu_f32_to_bf16_rn(second)) << 16 | cuemu_f32_to_bf16_rn(first);
#else
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#endif
}
__device__ __forceinline__ u32 pack_halves(f16, float first, float second) {
#ifdef GRADPRESS_EMULATOR
    return u32(cuemu_f32_to_f16_rn(second)) << 16 | cuemu_f32_to_f16_rn(first);
#else
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#endif
}

// The half in the low or the high bits of a word.
template <class Half>
__device__ __forceinline__ float low_half(Half, u32 word) {
    return widen(Half{u16(word)});
}
template <class Half>
__device__ __forceinline__ float high_half(Half, u32 word) {
    return widen(Half{u16(word >> 16)});
}

#ifdef GRADPRESS_EMULATOR

// What the instruction computes (PTX ISA, mma.m16n8k16), by way of memory that all lanes of a warp
// see. Each sum is exact and rounded once, which the device does not promise.
template <class Half>
void mma_m16n8k16(Half half, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    __shared__ u32 all[8][32][6];
    u32(&warp)[32][6] = all[threadIdx.x / 32];
    const int lane = int(threadIdx.x % 32), group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; ++i) warp[lane][i] = a[i];
    for (int i = 0; i < 2; ++i) warp[lane][4 + i] = b[i];
    __syncwarp();
    for (int i = 0; i < 4; ++i) { // row group + 8 * (i / 2), column 2 * pair + i % 2
        double sum = d[i];
        for (int other = 0; other < 4; ++other)
            for (int high = 0; high < 2; ++high) {
                const u32 left = warp[4 * group + other][i / 2 + 2 * high];
                const u32 right = warp[4 * (2 * pair + i % 2) + other][4 + high];
                sum += double(low_half(half, left)) * double(low_half(half, right));
                sum += double(high_half(half, left)) * double(high_half(half, right));
            }
        d[i] = float(sum);
    }
    __syncwarp();
}

#else

// d += a * b, all of it spread over the lanes of a warp.
__device__ __forceinline__ void mma_m16n8k16(bf16, float (&d)[4], const u32 (&a)[4],
                                             const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16(f16, float (&d)[4], const u32 (&a)[4],
                                             const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
#endif
