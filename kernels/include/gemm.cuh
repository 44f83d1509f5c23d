// One tile of a product of two matrices, summed in float32 in an order that depends on nothing but
// the shape.
//
// 128 threads fetch a slice of both operands into registers, put it into shared memory while the
// next slice is on its way, and multiply: 8 x 8 elements a thread by FMA (FmaCore), or 32 x 64 a
// warp on tensor cores (MmaCore).
#pragma once

#include "mma.cuh"
#include "operand.cuh"

// Stores what fits of `count` neighbouring floats.
template <int COUNT>
__device__ __forceinline__ void store_floats(float* at, i64 left, const float (&values)[COUNT]) {
    if (left >= COUNT && reinterpret_cast<u64>(at) % (4 * COUNT) == 0) {
        if constexpr (COUNT == 4)
            *reinterpret_cast<float4*>(at) =
                make_float4(values[0], values[1], values[2], values[3]);
        else *reinterpret_cast<float2*>(at) = make_float2(values[0], values[1]);
    } else {
#pragma unroll
        for (int j = 0; j < COUNT; ++j)
            if (j < left) at[j] = values[j];
    }
}

// ROWS x COLUMNS elements by FMA: a thread has 8 x 8, in halves that lie half a tile apart, so that
// the lanes of a warp read neighbouring quads.
template <int R, int C>
struct FmaCore {
    static constexpr int ROWS = R, COLUMNS = C, DEPTH = 16;
    static constexpr bool PAIRED = false;
    static constexpr int ACROSS = COLUMNS / 8; // threads side by side
    static_assert(ROWS * COLUMNS == 64 * GEMM_THREADS, "8 x 8 elements a thread");

    struct alignas(16) Shared {
        float a[DEPTH][ROWS + 4], b[DEPTH][COLUMNS + 4];
    };
    float sum[8][8];

    __device__ static __forceinline__ int row(int i) {
        return int(threadIdx.x) / ACROSS * 4 + i % 4 + i / 4 * (ROWS / 2);
    }
    __device__ static __forceinline__ int column(int j) {
        return int(threadIdx.x) % ACROSS * 4 + j % 4 + j / 4 * (COLUMNS / 2);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 64; ++i) sum[i / 8][i % 8] = 0.0f;
    }

    template <int OUTER, class Operand>
    __device__ static __forceinline__ void put(float (&to)[DEPTH][OUTER + 4],
                                               const Slice<Operand, OUTER, DEPTH, PAIRED>& slice,
                                               const Operand& operand, i64 outer, i64 inner) {
#pragma unroll
        for (int q = 0; q < slice.QUADS; ++q) {
            float v[4];
            slice.finish(operand, outer, inner, q, v);
            const int2 at = slice.place(q);
            if constexpr (Operand::INNER) {
#pragma unroll
                for (int j = 0; j < 4; ++j) to[at.y + j][at.x] = v[j];
            } else {
                *reinterpret_cast<float4*>(&to[at.y][at.x]) = make_float4(v[0], v[1], v[2], v[3]);
            }
        }
    }
    template <class A, class B>
    __device__ static __forceinline__ void put(Shared& shared, const A& a_slice, const B& b_slice,
                                               const typename A::Source& a,
                                               const typename B::Source& b, i64 row, i64 column,
                                               i64 inner) {
        put<ROWS>(shared.a, a_slice, a, row, inner);
        put<COLUMNS>(shared.b, b_slice, b, column, inner);
    }

    __device__ __forceinline__ void multiply(const Shared& shared) {
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            float a[8], b[8];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                read_four(&shared.a[k][row(4 * half)], &a[4 * half]);
                read_four(&shared.b[k][column(4 * half)], &b[4 * half]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
        }
    }

    // Element (i, j) of the tile goes to out[i * stride + j]; `rows` and `columns` of it exist.
    __device__ __forceinline__ void store_rows(float* out, i64 stride, i64 rows,
                                               i64 columns) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < 8; j += 4)
                if (row(i) < rows)
                    store_floats<4>(out + row(i) * stride + column(j), columns - column(j),
                                    {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]});
    }
    // The same transposed: to out[i + j * stride].
    __device__ __forceinline__ void store_columns(float* out, i64 stride, i64 rows,
                                                  i64 columns) const {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 8; i += 4)
                if (column(j) < columns)
                    store_floats<4>(out + column(j) * stride + row(i), rows - row(i),
                                    {sum[i][j], sum[i + 1][j], sum[i + 2][j], sum[i + 3][j]});
    }

private:
    __device__ static __forceinline__ void read_four(const float* from, float* to) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }
};

#if HAS_MMA

// ROWS x COLUMNS elements on tensor cores: a warp has 32 x 64. An operand of more than 8 (bf16) or
// 11 (f16) bits is the sum of two halves, and only the product of the two small ones is left out:
// A_PARTS + B_PARTS - 1 products, each of which the tensor core adds up in float32.
template <int R, int C, int D, class HalfType, int A_PARTS, int B_PARTS>
struct MmaCore {
    using Half = HalfType;
    static constexpr int ROWS = R, COLUMNS = C, DEPTH = D;
    static constexpr bool PAIRED = true;
    static constexpr int ACROSS = COLUMNS / 64; // warps side by side
    static constexpr int WORDS = DEPTH / 2 + 4; // of a line: no two lanes meet in a bank
    // Lifts the small halves of an f16 basis, whose entries are at most one, off the subnormals.
    static constexpr float LIFT = Same<Half, f16>::value ? 256.0f : 1.0f;
    static_assert(ROWS * COLUMNS == 64 * GEMM_THREADS, "32 x 64 elements a warp");

    struct alignas(16) Shared {
        u32 a[A_PARTS][ROWS][WORDS], b[B_PARTS][COLUMNS][WORDS];
    };
    float sum[2][8][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 64; ++i) sum[i / 32][i / 4 % 8][i % 4] = 0.0f;
    }

    // Two neighbours along `inner`, as the halves of a word of each part.
    template <int PARTS, int OUTER>
    __device__ static __forceinline__ void put_pair(u32 (&to)[PARTS][OUTER][WORDS], int outer,
                                                    int inner, float first, float second) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u32 word = pack_halves(Half{}, first, second);
            to[part][outer][inner / 2] = word;
            first -= low_half(Half{}, word);
            second -= high_half(Half{}, word);
        }
    }

    template <int PARTS, int OUTER, class Operand>
    __device__ static __forceinline__ void put(u32 (&to)[PARTS][OUTER][WORDS],
                                               const Slice<Operand, OUTER, DEPTH, PAIRED>& slice,
                                               const Operand& operand, i64 outer, i64 inner,
                                               float lift) {
        if constexpr (Same<typename Operand::Raw, Four<Half>>::value) {
            put_halves(to[0], slice);
        } else {
            constexpr int STEP = Operand::INNER ? 1 : 2;
#pragma unroll
            for (int q = 0; q < slice.QUADS; q += STEP) {
                const int2 at = slice.place(q);
                float v[4], w[4];
                slice.finish(operand, outer, inner, q, v);
                if constexpr (Operand::INNER) {
                    put_pair(to, at.x, at.y, v[0] * lift, v[1] * lift);
                    put_pair(to, at.x, at.y + 2, v[2] * lift, v[3] * lift);
                } else {
                    slice.finish(operand, outer, inner, q + 1, w);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        put_pair(to, at.x + j, at.y, v[j] * lift, w[j] * lift);
                }
            }
        }
    }
    // Elements that are halves already go as they are.
    template <int OUTER, class Operand>
    __device__ static __forceinline__ void
    put_halves(u32 (&to)[OUTER][WORDS], const Slice<Operand, OUTER, DEPTH, PAIRED>& slice) {
        constexpr int STEP = Operand::INNER ? 1 : 2;
#pragma unroll
        for (int q = 0; q < slice.QUADS; q += STEP) {
            const int2 at = slice.place(q);
            const auto& v = slice.raw[q].values;
            if constexpr (Operand::INNER) {
                to[at.x][at.y / 2] = u32(v[1].bits) << 16 | v[0].bits;
                to[at.x][at.y / 2 + 1] = u32(v[3].bits) << 16 | v[2].bits;
            } else {
                const auto& w = slice.raw[q + 1].values;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    to[at.x + j][at.y / 2] = u32(w[j].bits) << 16 | v[j].bits;
            }
        }
    }
    template <class A, class B>
    __device__ static __forceinline__ void put(Shared& shared, const A& a_slice, const B& b_slice,
                                               const typename A::Source& a,
                                               const typename B::Source& b, i64 row, i64 column,
                                               i64 inner) {
        put(shared.a, a_slice, a, row, inner, 1.0f);
        put(shared.b, b_slice, b, column, inner, LIFT);
    }

    __device__ static __forceinline__ int group() { return int(threadIdx.x) % 32 / 4; }
    __device__ static __forceinline__ int pair() { return int(threadIdx.x) % 4; }
    __device__ static __forceinline__ int first_row() {
        return int(threadIdx.x) / 32 / ACROSS * 32;
    }
    __device__ static __forceinline__ int first_column() {
        return int(threadIdx.x) / 32 % ACROSS * 64;
    }

    __device__ __forceinline__ void multiply(const Shared& shared) {
#pragma unroll
        for (int k = 0; k < DEPTH / 2; k += 8) {
            const int word = k + pair();
            u32 a[A_PARTS][2][4];
#pragma unroll
            for (int part = 0; part < A_PARTS; ++part)
#pragma unroll
                for (int i = 0; i < 8; ++i) // rows 16 * (i / 4) + 8 * (i % 2), words i / 2 % 2
                    a[part][i / 4][i % 4] = shared.a[part][first_row() + group() + i / 4 * 16 +
                                                           i % 2 * 8][word + i / 2 % 2 * 4];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                u32 b[B_PARTS][2];
#pragma unroll
                for (int part = 0; part < B_PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        b[part][i] =
                            shared.b[part][first_column() + 8 * j + group()][word + 4 * i];
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int parts = 0; parts < A_PARTS * B_PARTS; ++parts)
                        if (parts / B_PARTS + parts % B_PARTS < max(A_PARTS, B_PARTS))
                            mma_m16n8k16(Half{}, sum[i][j], a[parts / B_PARTS][i],
                                         b[parts % B_PARTS]);
            }
        }
    }

    __device__ __forceinline__ void store_rows(float* out, i64 stride, i64 rows,
                                               i64 columns) const {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int row = first_row() + group() + 8 * (i / 8);
            const int column = first_column() + 8 * (i % 8) + 2 * pair();
            const float* const v = &sum[i / 16][i % 8][i / 8 % 2 * 2];
            if (row < rows)
                store_floats<2>(out + row * stride + column, columns - column,
                                {v[0] / LIFT, v[1] / LIFT});
        }
    }
    __device__ __forceinline__ void store_columns(float* out, i64 stride, i64 rows,
                                                  i64 columns) const {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const int row = first_row() + group() + 8 * (i / 16);
            const int column = first_column() + 8 * (i / 2 % 8) + 2 * pair() + i % 2;
            if (row < rows && column < columns)
                out[column * stride + row] = sum[i / 32][i / 2 % 8][i / 16 % 2 * 2 + i % 2] / LIFT;
        }
    }
};

#endif

// The tile of a * b at (row, column), summed over the inner indices from `first` to `end`.
template <class Core, class A, class B>
__device__ __forceinline__ void multiply_tile(Core& core, typename Core::Shared& shared, const A& a,
                                              const B& b, i64 row, i64 column, i64 first, i64 end) {
    Slice<A, Core::ROWS, Core::DEPTH, Core::PAIRED> a_slice;
    Slice<B, Core::COLUMNS, Core::DEPTH, Core::PAIRED> b_slice;
    core.clear();
    a_slice.fetch(a, row, first);
    b_slice.fetch(b, column, first);
    for (i64 inner = first; inner < end; inner += Core::DEPTH) {
        core.put(shared, a_slice, b_slice, a, b, row, column, inner);
        __syncthreads();
        if (inner + Core::DEPTH < end) {
            a_slice.fetch(a, row, inner + Core::DEPTH);
            b_slice.fetch(b, column, inner + Core::DEPTH);
        }
        core.multiply(shared);
        __syncthreads();
    }
}
