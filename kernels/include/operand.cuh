// Operands of a product on their way to shared memory. An operand's `outer` index stays in the
// product, its `inner` one is summed over.
#pragma once

#include "element.cuh"

constexpr int GEMM_THREADS = 128;
constexpr int GEMM_BLOCKS = 2; // at least, on a multiprocessor: leaves a thread all its registers

template <class A, class B>
struct Same {
    static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
    static constexpr bool value = true;
};

// A matrix of T, contiguous along `inner` when INNER, else along `outer`. A line is what is
// contiguous: a line's number and a place in it say which element is meant.
template <class T, bool IS_INNER>
struct Dense {
    static constexpr bool INNER = IS_INNER;
    using Raw = Four<T>;

    const T* data;
    i64 stride; // of lines
    i64 outer_end, inner_end;

    __device__ __forceinline__ i64 lines() const { return INNER ? outer_end : inner_end; }
    __device__ __forceinline__ i64 places() const { return INNER ? inner_end : outer_end; }
    // Whether quads at multiples of four can be read as such.
    __device__ __forceinline__ bool has_quads() const {
        return stride % 4 == 0 && is_aligned<Raw>(data);
    }
    __device__ __forceinline__ Raw fetch_quad(i64 line, i64 place) const {
        return *reinterpret_cast<const Raw*>(data + line * stride + place);
    }
    // Four neighbours, zeros where there is nothing.
    __device__ __forceinline__ Raw fetch(i64 line, i64 place) const {
        Raw raw = {};
        const int left = line < lines() ? int(min(places() - place, i64(4))) : 0;
        const T* const at = data + line * stride + place;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j < left) raw.values[j] = at[j];
        return raw;
    }
    __device__ __forceinline__ void finish(const Raw& raw, i64, i64, float (&values)[4]) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = widen(raw.values[j]);
    }
};

// The quads of an OUTER x DEPTH slice that one thread brings from global to shared memory. PAIRED
// gives it quads of two neighbouring inner indices, so that it can put both into one word; its
// lanes spread over both indices, so that whole sectors are read and banks meet twice at most.
template <class Operand, int OUTER, int DEPTH, bool PAIRED>
struct Slice {
    static constexpr int QUADS = OUTER * DEPTH / 4 / GEMM_THREADS;
    static_assert(QUADS > 0 && (Operand::INNER || !PAIRED || QUADS % 2 == 0), "slice too small");

    using Source = Operand;
    typename Operand::Raw raw[QUADS];

    // Outer and inner index where quad `q` of this thread begins.
    __device__ static __forceinline__ int2 place(int q) {
        const int thread = int(threadIdx.x);
        if constexpr (Operand::INNER) {
            return make_int2(thread / (DEPTH / 4) + q * (4 * GEMM_THREADS / DEPTH),
                             thread % (DEPTH / 4) * 4);
        } else if constexpr (PAIRED) {
            constexpr int SPAN = GEMM_THREADS / 8 * 4; // outer indices that all threads cover
            return make_int2(thread / 8 * 4 + q / 2 * SPAN % OUTER,
                             thread % 8 * 2 + q / 2 * SPAN / OUTER * 16 + q % 2);
        } else {
            return make_int2(thread % (OUTER / 4) * 4,
                             thread / (OUTER / 4) + q * (4 * GEMM_THREADS / OUTER));
        }
    }

    __device__ __forceinline__ void fetch(const Operand& operand, i64 outer, i64 inner) {
        const bool whole = outer + OUTER <= operand.outer_end &&
                           inner + DEPTH <= operand.inner_end && operand.has_quads();
        if (whole) {
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const int2 at = place(q);
                raw[q] = Operand::INNER ? operand.fetch_quad(outer + at.x, inner + at.y)
                                        : operand.fetch_quad(inner + at.y, outer + at.x);
            }
        } else {
#pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                const int2 at = place(q);
                raw[q] = Operand::INNER ? operand.fetch(outer + at.x, inner + at.y)
                                        : operand.fetch(inner + at.y, outer + at.x);
            }
        }
    }

    __device__ __forceinline__ void finish(const Operand& operand, i64 outer, i64 inner, int q,
                                           float (&values)[4]) const {
        const int2 at = place(q);
        if constexpr (Operand::INNER)
            operand.finish(raw[q], outer + at.x, inner + at.y, values);
        else operand.finish(raw[q], inner + at.y, outer + at.x, values);
    }
};
