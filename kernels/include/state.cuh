// What a subspace's refresh knows, on the device, so that no launch waits for the host: `flags` has
// 8 int32, `numbers` 32 float64.
#pragma once

#include "element.cuh"

enum Flag {
    ACTIVE, // the stages below that run
    STATUS,
    FAILED, // a Gram matrix was not finite
};

enum Stage {
    FRESH = 1, // from a random sketch
    MAIN = 2,  // everything that a gradient with a subspace takes
    PASS = 4,  // one more pass towards orthonormal columns
};

// lowrank::refresh::Status of the CPU.
enum Status { REFRESHED, ZERO_GRADIENT, KEPT };

enum Number {
    SQUARE_NORM,
    ENERGY,
    COSINE,
    DEVIATION,    // of a Gram matrix from the identity, its largest
    LARGEST,      // on the diagonal of a Gram matrix
    PIVOT,        // the smallest, as a share of its column's square
    SWEEPS = 8,   // how far from diagonal each sweep found a matrix
    MAX_SWEEPS = 24,
};

// Whether a kernel of these stages has anything to do; `flags` null: always.
__device__ __forceinline__ bool runs(const int* flags, int stages) {
    return !flags || (flags[ACTIVE] & stages) == stages;
}

// Numbers that are not negative are ordered as their bits, which makes their maximum the same in
// whatever order it is found. A NaN counts as more than all.
__device__ __forceinline__ u64 order_of(double x) { return u64(__double_as_longlong(x)); }

// Raises a number to the largest that the threads of a block come with. All threads come here.
__device__ __forceinline__ void raise(double* number, double value) {
    __shared__ u64 largest;
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    atomicMax(&largest, order_of(value));
    __syncthreads();
    // Nobody else reads it, so that the next use need not wait.
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<u64*>(number), largest);
}
