// A basis of integer codes as an operand of a product (Q-GaLore, arXiv 2407.08296, section 3.2):
// its codes are fetched, and become numbers on their way to shared memory, nowhere else.
#pragma once

#include "gemm.cuh"
#include "grid.cuh"
#include "pack.cuh"

template <int BITS, bool IS_INNER>
struct Codes {
    static constexpr bool INNER = IS_INNER;
    using Raw = u32; // four codes as load_codes has them

    const u8* data;
    const float* scale;
    const u8* zero_point; // null: symmetric codes
    i64 stride;           // of lines
    i64 outer_end, inner_end;
    i64 group_size;

    __device__ __forceinline__ i64 lines() const { return INNER ? outer_end : inner_end; }
    __device__ __forceinline__ i64 places() const { return INNER ? inner_end : outer_end; }
    __device__ __forceinline__ bool has_quads() const {
        return stride % 4 == 0 && is_aligned<u32>(data);
    }
    __device__ __forceinline__ Raw fetch_quad(i64 line, i64 place) const {
        return load_codes<BITS>(data, line * stride + place, 4);
    }
    __device__ __forceinline__ Raw fetch(i64 line, i64 place) const {
        u32 word = 0;
        if (line < lines())
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (place + j < places())
                    word |= load_code(data, line * stride + place + j, BITS) << BITS * j;
        return word;
    }

    __device__ __forceinline__ Grid grid(i64 element) const {
        // Dividing is a shift for nearly every size in use.
        const i64 group = (group_size & (group_size - 1)) == 0
                              ? element >> (__ffsll(group_size) - 1)
                              : element / group_size;
        return {scale[group], zero_point ? int(zero_point[group]) : 0};
    }
    __device__ __forceinline__ void finish(Raw raw, i64 line, i64 place,
                                           float (&values)[4]) const {
        const Format format(BITS, zero_point == nullptr);
        const i64 first = line * stride + place;
        const i64 left = line < lines() ? places() - place : 0;
        const bool one_grid = stride % 4 == 0 && group_size % 4 == 0;
        Grid mine = left > 0 ? grid(first) : Grid{};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j > 0 && j < left && !one_grid) mine = grid(first + j);
            values[j] = j < left ? mine.value(format.code(code_of<BITS>(raw, j))) : 0.0f;
        }
    }
};
