// Block-wise integer quantization, packing, and stochastic rounding to bfloat16.
#include "grid.cuh"
#include "pack.cuh"
#include "philox.cuh"
#include "tile.cuh"

// A group's grid is written by the lane that leads it.
__device__ __forceinline__ void store_grid(float* scale, u8* zero_point, i64 group, Grid grid) {
    scale[group] = grid.scale;
    if (zero_point) zero_point[group] = u8(grid.zero_point);
}

template <int BITS>
__device__ __forceinline__ void quantize_tile(const ELEM* x, u8* codes, float* scale,
                                              u8* zero_point, u64* nonfinite, i64 numel,
                                              i64 group_size, bool stochastic, Key key,
                                              u32* exchange) {
    const Tile tile(group_size, blockIdx.x);
    const Format format(BITS, zero_point == nullptr);
    float values[2][4];
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        load_four(x + tile.element(quad), tile.left(quad, numel), values[quad]);
    }
    u32 dithers[2][4] = {};
    if (stochastic) dithers_of_quads(key, tile.number(), exchange, dithers);
    u32 range[2][2];
    const u32 replaced = extremes(values, range);
    add_to_counter(nonfinite, replaced);
    tile.max_of_groups(range);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const int left = tile.left(quad, numel);
        const Range covered = Range::of(range[quad][0], range[quad][1]);
        const Grid grid = Grid::covering(covered, format);
        if (tile.leads(quad) && left > 0)
            store_grid(scale, zero_point, tile.group(quad), grid);
        const float inverse = 1.0f / grid.scale;
        u32 stored[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float value = replaced ? covered.sanitize(values[quad][j]) : values[quad][j];
            stored[j] = format.stored(
                stochastic
                    ? grid.round_stochastic<BITS>(value, inverse, dithers[quad][j], format)
                    : grid.round_nearest(value, inverse, format));
        }
        store_codes<BITS>(codes, tile.element(quad), left, stored);
    }
}

// Quantizes groups of plain sizes. Block: 32 threads for each 256 elements, up to 256 (tile.cuh).
extern "C" __global__ void __launch_bounds__(256)
quantize_blockwise(const ELEM* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scale,
                   u8* __restrict__ zero_point, u64* nonfinite, i64 numel, i64 group_size,
                   int bits, int stochastic, Key key) {
    __shared__ __align__(16) u32 exchange[MAX_WARPS][128];
    u32* const mine = exchange[threadIdx.x / 32];
    if (bits == 4)
        quantize_tile<4>(x, codes, scale, zero_point, nonfinite, numel, group_size, stochastic,
                         key, mine);
    else
        quantize_tile<8>(x, codes, scale, zero_point, nonfinite, numel, group_size, stochastic,
                         key, mine);
}

// The range of the group of `size` elements from `begin` on, found by a team.
__device__ __forceinline__ Range range_of_group(const ELEM* x, i64 begin, i64 size, i64 numel,
                                                Team team, u32& nonfinite) {
    u32 highest = 0, lowest = 0;
    const i64 end = min(begin + size, numel);
    for (i64 element = begin + team.lane(); element < end; element += team.size()) {
        const float value = widen(x[element]);
        if (is_finite(value)) extend(highest, lowest, value);
        else ++nonfinite;
    }
    highest = team.max(highest);
    lowest = team.max(lowest);
    return Range::of(highest, lowest);
}

// Quantizes groups of any size. Block: 256 threads in teams, each of which has a run: a group, or
// two where a byte belongs to both.
extern "C" __global__ void __launch_bounds__(256, 4)
quantize_blockwise_any(const ELEM* __restrict__ x, u8* __restrict__ codes,
                       float* __restrict__ scale, u8* __restrict__ zero_point, u64* nonfinite,
                       i64 numel, i64 group_size, int bits, int stochastic, Key key, int team) {
    const Format format(bits, zero_point == nullptr);
    const Team mine(team, blockIdx.x);
    const bool two = bits == 4 && group_size % 2 == 1;
    const i64 run = two ? 2 * group_size : group_size;
    const i64 first = mine.number() * run, group = mine.number() * (two ? 2 : 1);
    u32 replaced = 0;
    const Range front = range_of_group(x, first, group_size, numel, mine, replaced);
    Range back = front;
    if (two) back = range_of_group(x, first + group_size, group_size, numel, mine, replaced);
    add_to_counter(nonfinite, replaced);
    const Grid front_grid = Grid::covering(front, format), back_grid = Grid::covering(back, format);
    if (mine.lane() == 0 && first < numel) store_grid(scale, zero_point, group, front_grid);
    if (mine.lane() == 0 && two && first + group_size < numel)
        store_grid(scale, zero_point, group + 1, back_grid);
    const float front_inverse = 1.0f / front_grid.scale, back_inverse = 1.0f / back_grid.scale;
    Dithers dithers(key);
    for (i64 turn = 0; turn < run; turn += team) {
        const i64 place = turn + mine.lane(), element = first + place;
        const bool here = place < run && element < numel;
        u32 stored = 0;
        if (here) {
            const bool in_front = place < group_size;
            const Grid grid = choose(in_front, front_grid, back_grid);
            const float inverse = in_front ? front_inverse : back_inverse;
            const float value = choose(in_front, front, back).sanitize(widen(x[element]));
            int code;
            if (!stochastic) code = grid.round_nearest(value, inverse, format);
            else code = grid.round_stochastic<8>(value, inverse, dithers.at(element), format);
            stored = format.stored(code);
        }
        store_code(codes, element, here, stored, bits);
    }
}

template <int BITS>
__device__ __forceinline__ void dequantize_tile(const u8* codes, const float* scale,
                                                const u8* zero_point, ELEM* out, i64 numel,
                                                i64 group_size) {
    const Format format(BITS, zero_point == nullptr);
    const i64 first = (i64(blockIdx.x) * MAX_WARPS + threadIdx.x / 32) * 256;
    const i64 shared_group = group_size >= 256 ? first / group_size : 0;
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const i64 element = first + 128 * quad + threadIdx.x % 32 * 4;
        const int left = left_of(numel, element);
        if (left == 0) continue;
        const i64 group = group_size >= 256 ? shared_group : element / int(group_size);
        const Grid grid = {scale[group], zero_point ? int(zero_point[group]) : 0};
        const u32 word = load_codes<BITS>(codes, element, left);
        ELEM values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            values[j] = narrow<ELEM>(grid.value(format.code(code_of<BITS>(word, j))));
        store_four(out + element, left, values);
    }
}

// The values behind codes in groups of 32, 64, 128, or any multiple of 256. Block: 256 threads,
// 2048 elements.
extern "C" __global__ void __launch_bounds__(256)
dequantize_blockwise(const u8* __restrict__ codes, const float* __restrict__ scale,
                     const u8* __restrict__ zero_point, ELEM* __restrict__ out, i64 numel,
                     i64 group_size, int bits) {
    if (bits == 4) dequantize_tile<4>(codes, scale, zero_point, out, numel, group_size);
    else dequantize_tile<8>(codes, scale, zero_point, out, numel, group_size);
}

// The same for groups of any size. Block: 256 threads, 512 elements.
extern "C" __global__ void __launch_bounds__(256, 4)
dequantize_blockwise_any(const u8* __restrict__ codes, const float* __restrict__ scale,
                         const u8* __restrict__ zero_point, ELEM* __restrict__ out, i64 numel,
                         i64 group_size, int bits) {
    const Format format(bits, zero_point == nullptr);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const i64 element = (i64(blockIdx.x) * 2 + half) * 256 + threadIdx.x;
        if (element >= numel) return;
        const i64 group = element / group_size;
        const Grid grid = {scale[group], zero_point ? int(zero_point[group]) : 0};
        out[element] = narrow<ELEM>(grid.value(format.code(load_code(codes, element, bits))));
    }
}

// Packs codes of 4 bits two to the byte. Block: 256 threads, 4096 codes, 16 of each thread.
extern "C" __global__ void __launch_bounds__(256)
pack_int4(const u8* __restrict__ codes, u8* __restrict__ packed, i64 numel) {
    const i64 element = (i64(blockIdx.x) * 256 + threadIdx.x) * 16;
    if (element >= numel) return;
    if (numel - element >= 16 && is_aligned<uint4>(codes + element) &&
        is_aligned<uint2>(packed + element / 2)) {
        const uint4 four = *reinterpret_cast<const uint4*>(codes + element);
        const u32 words[4] = {four.x, four.y, four.z, four.w};
        u32 halves[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Each odd nibble moves down beside the even one before it; then bytes 0 and 2 remain.
            const u32 pairs = (words[i] & 0x000f'000f) | (words[i] >> 4 & 0x00f0'00f0);
            halves[i] = __byte_perm(pairs, 0, 0x4420);
        }
        *reinterpret_cast<uint2*>(packed + element / 2) =
            make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
        return;
    }
    for (i64 i = element; i < min(element + 16, numel); i += 2) {
        const u32 high = i + 1 < numel ? codes[i + 1] : 0;
        packed[i / 2] = u8((codes[i] & 15) | high << 4);
    }
}

// The inverse of pack_int4, in the same grid.
extern "C" __global__ void __launch_bounds__(256)
unpack_int4(const u8* __restrict__ packed, u8* __restrict__ codes, i64 numel) {
    const i64 element = (i64(blockIdx.x) * 256 + threadIdx.x) * 16;
    if (element >= numel) return;
    if (numel - element >= 16 && is_aligned<uint2>(packed + element / 2) &&
        is_aligned<uint4>(codes + element)) {
        const uint2 two = *reinterpret_cast<const uint2*>(packed + element / 2);
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 pairs = __byte_perm(i < 2 ? two.x : two.y, 0, i % 2 ? 0x4342 : 0x4140);
            words[i] = (pairs & 0x000f'000f) | (pairs & 0x00f0'00f0) << 4;
        }
        *reinterpret_cast<uint4*>(codes + element) =
            make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
    for (i64 i = element; i < min(element + 16, numel); ++i)
        codes[i] = packed[i / 2] >> 4 * (i % 2) & 15;
}

// Rounds float32 to bfloat16. Block: 256 threads, 2048 elements; a warp has 256 of them in rows of
// 32, as dithers have.
extern "C" __global__ void __launch_bounds__(256)
round_bf16_stochastic(const float* __restrict__ x, bf16* __restrict__ out, i64 numel, Key key) {
    const i64 number = i64(blockIdx.x) * MAX_WARPS + threadIdx.x / 32;
    const i64 first = number * 256 + threadIdx.x % 32;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = first + 32 * i < numel ? x[first + 32 * i] : 0.0f;
    u32 dithers[8];
    dithers_of_lane(key, number, dithers);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (first + 32 * i < numel) out[first + 32 * i] = narrow_stochastic(values[i], dithers[i]);
}
