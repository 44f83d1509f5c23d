// The two ways in which threads share groups of elements.
//
// A Tile serves plain sizes: 32, 64, 128, and 256 * k for k up to 8. A warp has 256 consecutive
// elements, a lane two quads of them, 4 * lane and 128 + 4 * lane from the first. Groups are parts
// of a warp's elements, or several warps of one block have one.
//
// A Team serves every size: a power of two of lanes, or the 256 threads of a block, take the
// elements of a run in turn. All threads of a block have the same number of turns, those without
// an element included, so that shuffles and barriers always find everybody.
#pragma once

#include "element.cuh"
#include "reduce.cuh"

class Tile {
public:
    // `block`: the block's number among those of its tensor.
    __device__ Tile(i64 size, i64 block)
        : lanes_(size < 128 ? int(size) / 4 : 32), joined_(size >= 256),
          warps_(joined_ ? int(size / 256) : 1), warp_(threadIdx.x / 32), lane_(threadIdx.x % 32),
          block_(block) {}

    // The 256 elements' number in the tensor, which is that of their dithers.
    __device__ i64 number() const { return block_ * int(blockDim.x / 32) + warp_; }
    __device__ int warp() const { return warp_; }
    // Both quads belong to one group.
    __device__ bool joined() const { return joined_; }

    __device__ i64 element(int quad) const { return number() * 256 + 128 * quad + 4 * lane_; }
    // How many of the quad's elements there are.
    __device__ int left(int quad, i64 numel) const { return left_of(numel, element(quad)); }
    // Whole groups lie in a block, so that no division has more than 32 bits.
    __device__ i64 group(int quad) const {
        if (joined_) return block_ * (int(blockDim.x / 32) / warps_) + warp_ / warps_;
        return number() * (64 / lanes_) + quad * (32 / lanes_) + lane_ / lanes_;
    }
    // Whether this lane writes what the group of its quad has once.
    __device__ bool leads(int quad) const {
        return lane_ % lanes_ == 0 && (!joined_ || (quad == 0 && warp_ % warps_ == 0));
    }

    // Replaces each of COUNT numbers of each quad by its largest in the group.
    template <int COUNT>
    __device__ void max_of_groups(u32 (&values)[2][COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (joined_) {
                values[0][i] = max_of_lanes(max(values[0][i], values[1][i]), 32);
            } else {
                values[0][i] = max_of_lanes(values[0][i], lanes_);
                values[1][i] = max_of_lanes(values[1][i], lanes_);
            }
        }
        if (!joined_) return;
        if (warps_ > 1) max_of_warps(values[0]);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[1][i] = values[0][i];
    }

private:
    template <int COUNT>
    __device__ void max_of_warps(u32 (&values)[COUNT]) const {
        __shared__ u32 parts[MAX_WARPS][COUNT]; // each instance is used once in a kernel
        if (lane_ == 0)
            for (int i = 0; i < COUNT; ++i) parts[warp_][i] = values[i];
        __syncthreads();
        const int first = warp_ / warps_ * warps_;
        for (int warp = first; warp < first + warps_; ++warp)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) values[i] = max(values[i], parts[warp][i]);
    }

    int lanes_;   // lanes that share a group, counted within a quad
    bool joined_;
    int warps_;   // warps that share a group
    int warp_, lane_;
    i64 block_;
};

class Team {
public:
    __device__ Team(int size, i64 block)
        : size_(size), lane_(int(threadIdx.x) % size),
          number_(block * (int(blockDim.x) / size) + int(threadIdx.x) / size) {}

    __device__ int size() const { return size_; }
    __device__ int lane() const { return lane_; }
    // Which run of the tensor this team has.
    __device__ i64 number() const { return number_; }

    __device__ u32 max(u32 value) const {
        value = max_of_lanes(value, size_ < 32 ? size_ : 32);
        if (size_ <= 32) return value;
        __shared__ u32 parts[MAX_WARPS];
        __syncthreads(); // the parts of the last time have been read
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
        __syncthreads();
        for (int warp = 0; warp < MAX_WARPS; ++warp) value = ::max(value, parts[warp]);
        return value;
    }

private:
    int size_, lane_;
    i64 number_;
};
