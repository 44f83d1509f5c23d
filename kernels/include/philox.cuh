// Philox4x32-10 and the dithers of src/rng/mod.rs, which documents their layout: 256 elements share
// a block, 32 lanes have a counter each, and a lane's four words hold dithers of eight elements.
#pragma once

#include "element.cuh"

// rng::Key: everything a dither depends on, besides the element's index.
struct Key {
    u32 key[2];
    u32 tensor_id;
    u32 step;
};

__device__ __forceinline__ uint4 philox4x32(Key key, u64 counter) {
    uint4 c = make_uint4(u32(counter), u32(counter >> 32), key.tensor_id, key.step);
    u32 k0 = key.key[0], k1 = key.key[1];
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 p0 = u64(0xD251'1F53u) * c.x, p1 = u64(0xCD9E'8D57u) * c.z;
        c = make_uint4(u32(p1 >> 32) ^ c.y ^ k0, u32(p1), u32(p0 >> 32) ^ c.w ^ k1, u32(p0));
        k0 += 0x9E37'79B9u;
        k1 += 0xBB67'AE85u;
    }
    return c;
}

// Dithers for a thread that visits elements one by one. Elements 32 apart share a counter, so that
// a whole warp in a row pays for a call every eight elements.
class Dithers {
public:
    __device__ explicit Dithers(Key key) : key_(key) {}

    __device__ __forceinline__ u32 at(i64 element) {
        const i64 counter = element / 256 * 32 + element % 32;
        if (counter != counter_) {
            words_ = philox4x32(key_, u64(counter));
            counter_ = counter;
        }
        const u32 half = u32(element) % 256 / 32;
        const u32 low = half & 2 ? words_.y : words_.x, high = half & 2 ? words_.w : words_.z;
        return (half & 4 ? high : low) >> 16 * (half & 1) & 0xffff;
    }

private:
    Key key_;
    i64 counter_ = -1;
    uint4 words_;
};

// Dithers of a warp's 256 elements, lane and lane + 32 * half of which belong to a lane.
__device__ __forceinline__ void dithers_of_lane(Key key, i64 block, u32 (&dithers)[8]) {
    const uint4 words = philox4x32(key, u64(block) * 32 + threadIdx.x % 32);
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int half = 0; half < 8; ++half) dithers[half] = word[half / 2] >> 16 * (half % 2) & 0xffff;
}

// The same for the layout of tile.cuh, in which a lane has two runs of four elements: the words
// change hands through `exchange`, 128 words of shared memory that this warp has for itself.
__device__ __forceinline__ void dithers_of_quads(Key key, i64 block, u32* exchange,
                                                 u32 (&dithers)[2][4]) {
    const u32 lane = threadIdx.x % 32;
    const uint4 words = philox4x32(key, u64(block) * 32 + lane);
    exchange[lane] = words.x;
    exchange[32 + lane] = words.y;
    exchange[64 + lane] = words.z;
    exchange[96 + lane] = words.w;
    __syncwarp();
    // Element 128 * quad + 4 * lane + j has half 4 * quad + lane / 8 of lane 4 * (lane % 8) + j.
    const u32 shift = 16 * (lane / 8 % 2);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const u32 place = 64 * quad + 32 * (lane / 16) + 4 * (lane % 8);
        const uint4 four = *reinterpret_cast<const uint4*>(exchange + place);
        const u32 word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) dithers[quad][j] = word[j] >> shift & 0xffff;
    }
}
