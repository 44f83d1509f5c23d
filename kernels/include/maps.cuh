// Optimizer states of 8 and of 4 bits behind one interface (src/quant/dynamic/codec.rs).
#pragma once

#include "map4bit.cuh"
#include "map8bit.cuh"

template <int BITS>
struct Maps {
    using Decode = DecodeMap8;
    using Encode = EncodeMap8;
};
template <>
struct Maps<4> {
    using Decode = DecodeMap4;
    using Encode = EncodeMap4;
};

// The scale of a block, and what its values are multiplied with to lie in [-1, 1].
struct BlockScale {
    float scale, inverse;

    __device__ static BlockScale of(float largest) {
        // A scale whose inverse overflows would turn zeros into NaNs.
        if (largest >= 1.17549435e-38f) return {largest, 1.0f / largest};
        return {0.0f, 0.0f};
    }
};
