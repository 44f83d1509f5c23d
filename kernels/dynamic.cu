// The dynamic maps of optimizer states as operations on whole tensors.
#include "grid.cuh"
#include "maps.cuh"
#include "pack.cuh"
#include "tile.cuh"

__device__ __forceinline__ BlockScale scale_of(Range range) {
    return BlockScale::of(fmaxf(range.high, -range.low));
}

template <int BITS>
__device__ __forceinline__ void encode_tile(const ELEM* x, u8* codes, float* scale, u64* nonfinite,
                                            i64 numel, i64 block_size, bool is_signed) {
    __shared__ typename Maps<BITS>::Encode map;
    const Tile tile(block_size, blockIdx.x);
    float values[2][4];
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        load_four(x + tile.element(quad), tile.left(quad, numel), values[quad]);
    }
    map.load(is_signed);
    __syncthreads();
    u32 range[2][2];
    const u32 replaced = extremes(values, range);
    add_to_counter(nonfinite, replaced);
    tile.max_of_groups(range);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const int left = tile.left(quad, numel);
        const Range covered = Range::of(range[quad][0], range[quad][1]);
        const BlockScale block = scale_of(covered);
        if (tile.leads(quad) && left > 0) scale[tile.group(quad)] = block.scale;
        u32 stored[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float value = replaced ? covered.sanitize(values[quad][j]) : values[quad][j];
            stored[j] = map.code(value * block.inverse);
        }
        store_codes<BITS>(codes, tile.element(quad), left, stored);
    }
}

// Quantizes blocks of plain sizes. Block: 32 threads for each 256 elements, up to 256 (tile.cuh).
extern "C" __global__ void __launch_bounds__(256)
quantize_dynamic(const ELEM* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scale,
                 u64* nonfinite, i64 numel, i64 block_size, int bits, int is_signed) {
    if (bits == 4) encode_tile<4>(x, codes, scale, nonfinite, numel, block_size, is_signed);
    else encode_tile<8>(x, codes, scale, nonfinite, numel, block_size, is_signed);
}

template <int BITS>
__device__ __forceinline__ void encode_run(const ELEM* x, u8* codes, float* scale, u64* nonfinite,
                                           i64 numel, i64 block_size, bool is_signed, Team team) {
    __shared__ typename Maps<BITS>::Encode map;
    map.load(is_signed);
    __syncthreads();
    const i64 first = team.number() * block_size;
    u32 highest = 0, lowest = 0, replaced = 0;
    const i64 end = min(first + block_size, numel);
    for (i64 element = first + team.lane(); element < end; element += team.size()) {
        const float value = widen(x[element]);
        if (is_finite(value)) extend(highest, lowest, value);
        else ++replaced;
    }
    add_to_counter(nonfinite, replaced);
    highest = team.max(highest);
    lowest = team.max(lowest);
    const Range range = Range::of(highest, lowest);
    const BlockScale block = scale_of(range);
    if (team.lane() == 0 && first < numel) scale[team.number()] = block.scale;
    for (i64 turn = 0; turn < block_size; turn += team.size()) {
        const i64 element = first + turn + team.lane();
        const bool here = turn + team.lane() < block_size && element < numel;
        u32 stored = 0;
        if (here) stored = map.code(range.sanitize(widen(x[element])) * block.inverse);
        store_code(codes, element, here, stored, BITS);
    }
}

// Quantizes blocks of any size. Block: 256 threads in teams, each of which has a block of values.
extern "C" __global__ void __launch_bounds__(256, 4)
quantize_dynamic_any(const ELEM* __restrict__ x, u8* __restrict__ codes, float* __restrict__ scale,
                     u64* nonfinite, i64 numel, i64 block_size, int bits, int is_signed,
                     int team) {
    const Team mine(team, blockIdx.x);
    if (bits == 4) encode_run<4>(x, codes, scale, nonfinite, numel, block_size, is_signed, mine);
    else encode_run<8>(x, codes, scale, nonfinite, numel, block_size, is_signed, mine);
}

template <int BITS>
__device__ __forceinline__ void decode_tile(const u8* codes, const float* scale, float* out,
                                            i64 numel, i64 block_size, bool is_signed) {
    __shared__ typename Maps<BITS>::Decode map;
    map.load(is_signed);
    __syncthreads();
    const i64 first = (i64(blockIdx.x) * MAX_WARPS + threadIdx.x / 32) * 256;
    const i64 shared_block = block_size >= 256 ? first / block_size : 0;
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const i64 element = first + 128 * quad + threadIdx.x % 32 * 4;
        const int left = left_of(numel, element);
        if (left == 0) continue;
        const float factor = scale[block_size >= 256 ? shared_block : element / int(block_size)];
        const u32 word = load_codes<BITS>(codes, element, left);
        float values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = map.value(code_of<BITS>(word, j)) * factor;
        store_four(out + element, left, values);
    }
}

// The values behind codes in blocks of 32, 64, 128, or any multiple of 256. Block: 256 threads,
// 2048 elements.
extern "C" __global__ void __launch_bounds__(256)
dequantize_dynamic(const u8* __restrict__ codes, const float* __restrict__ scale,
                   float* __restrict__ out, i64 numel, i64 block_size, int bits, int is_signed) {
    if (bits == 4) decode_tile<4>(codes, scale, out, numel, block_size, is_signed);
    else decode_tile<8>(codes, scale, out, numel, block_size, is_signed);
}

template <int BITS>
__device__ __forceinline__ void decode_rows(const u8* codes, const float* scale, float* out,
                                            i64 numel, i64 block_size, bool is_signed) {
    __shared__ typename Maps<BITS>::Decode map;
    map.load(is_signed);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const i64 element = (i64(blockIdx.x) * 2 + half) * 256 + threadIdx.x;
        if (element < numel)
            out[element] = map.value(load_code(codes, element, BITS)) * scale[element / block_size];
    }
}

// The same for blocks of any size. Block: 256 threads, 512 elements.
extern "C" __global__ void __launch_bounds__(256, 4)
dequantize_dynamic_any(const u8* __restrict__ codes, const float* __restrict__ scale,
                       float* __restrict__ out, i64 numel, i64 block_size, int bits,
                       int is_signed) {
    if (bits == 4) decode_rows<4>(codes, scale, out, numel, block_size, is_signed);
    else decode_rows<8>(codes, scale, out, numel, block_size, is_signed);
}
