// Scores of weights, and selections among them. Which weights stay is bit-equal to the CPU: scores
// are the same products of float32, and a choice is a matter of integers.
#include "element.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int EACH = 2048; // elements of a block of the kernels that work on each by itself
constexpr int WARPS = THREADS / 32;
// On a multiprocessor. More of them would leave too few registers.
constexpr int BLOCKS = 4;
constexpr int BINS = THREADS; // a thread for each
constexpr int INFINITE = 0x7f80'0000;

enum Kind { GIVEN, WEIGHT, HALF };

__device__ __forceinline__ float round_half(float x) { return widen(narrow<f16>(x)); }

// What is scored, and by what.
struct Score {
    const ELEM* weight;
    const float* scale; // of columns; null for none
    const float* grad;  // of elements; null for none
    float alpha;
    int kind;

    __device__ float at(i64 element, i64 column) const {
        const float given = widen(weight[element]);
        if (kind == GIVEN) return given;
        const float size = fabsf(given);
        if (!grad) return scale ? size * scale[column] : size;
        const float slope = fabsf(grad[element]);
        if (kind == HALF) {
            const float product = round_half(round_half(size) * round_half(slope));
            return scale ? size * scale[column] + product : product;
        }
        const float term = alpha * slope;
        return size * (scale ? scale[column] + term : term);
    }

    // An integer in the order of the scores; not a number counts as infinite.
    __device__ int key(i64 element, i64 column, u32& nan) const {
        const u32 bits = __float_as_uint(at(element, column));
        const int magnitude = int(bits & MAGNITUDE);
        if (magnitude > INFINITE) {
            ++nan;
            return INFINITE;
        }
        return kind == GIVEN && bits >> 31 ? -magnitude : magnitude;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    score_weights(const ELEM* __restrict__ weight, const float* __restrict__ scale,
                  const float* __restrict__ grad, float alpha, int kind, i64 columns,
                  float* __restrict__ out, i64 numel) {
    const Score score{weight, scale, grad, alpha, kind};
    const i64 first = i64(blockIdx.x) * EACH;
    for (i64 i = first + threadIdx.x; i < min(first + EACH, numel); i += THREADS)
        out[i] = score.at(i, i % columns);
}

// The sum over the threads up to this one; every thread of the block takes part.
__device__ __forceinline__ u32 inclusive_sum(u32 value, u32 (&totals)[WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const u32 before = __shfl_up_sync(FULL_WARP, value, distance);
        if (lane >= distance) value += before;
    }
    if (lane == 31) totals[warp] = value;
    __syncthreads();
    for (int other = 0; other < warp; ++other) value += totals[other];
    __syncthreads();
    return value;
}

// The key of a rank, and how many are less and the same.
struct Threshold {
    u32 key;
    u32 less, equal;
};

__device__ __forceinline__ u32 ordered(int key) { return u32(key) ^ 0x8000'0000; }

// A row of weights, or all of them, for a block of threads.
struct Span {
    Score score;
    i64 first, count, columns;

    // Calls `use` with the place and the key of every weight; all threads take as many turns, those
    // past the end with a place of -1.
    template <class Use>
    __device__ void each(u32& nan, Use use) const {
        i64 column = (first + threadIdx.x) % columns;
        const i64 stride = THREADS % columns;
        for (i64 base = 0; base < count; base += THREADS) {
            const i64 place = base + threadIdx.x;
            const bool here = place < count;
            use(here ? place : -1, here ? ordered(score.key(first + place, column, nan)) : 0);
            column += stride;
            if (column >= columns) column -= columns;
        }
    }
};

// Eight bits a pass, from the highest on.
__device__ Threshold threshold_of(const Span& span, u32 rank) {
    __shared__ u32 bins[BINS];
    __shared__ u32 totals[WARPS];
    __shared__ Threshold found;
    u32 prefix = 0, less = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        bins[threadIdx.x] = 0;
        __syncthreads();
        const u32 known = shift == 24 ? 0 : ~0u << (shift + 8);
        u32 nan = 0;
        span.each(nan, [&](i64 place, u32 key) {
            if (place >= 0 && (key & known) == prefix) atomicAdd(&bins[key >> shift & 255], 1u);
        });
        __syncthreads();
        const u32 here = bins[threadIdx.x];
        const u32 through = less + inclusive_sum(here, totals);
        if (through - here <= rank && rank < through)
            found = {prefix | u32(threadIdx.x) << shift, through - here, here};
        __syncthreads();
        prefix = found.key;
        less = found.less;
    }
    return found;
}

// A block for each row of `span` weights.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    select_rows(const ELEM* __restrict__ weight, const float* __restrict__ scale,
                 const float* __restrict__ grad, float alpha, int kind, i64 columns,
                 u8* __restrict__ mask, u64* __restrict__ nan, i64 span, i64 drop, int through) {
    __shared__ u32 votes[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 first = i64(blockIdx.x) * span;
    const Span all{{weight, scale, grad, alpha, kind}, first, span, columns};
    const bool every = drop >= span, none = drop == 0 && !through;
    Threshold threshold{0, 0, 0};
    if (!every && !none) threshold = threshold_of(all, u32(through ? drop : drop - 1));
    const u32 dropped = through ? threshold.equal : u32(drop) - threshold.less;
    const bool ordered_ties = !every && !none && dropped < threshold.equal;
    u32 seen = 0, count = 0;
    all.each(count, [&](i64 place, u32 key) {
        const bool tie = place >= 0 && key == threshold.key;
        u32 before = 0;
        if (ordered_ties) {
            const u32 vote = __ballot_sync(FULL_WARP, tie);
            if (lane == 0) votes[warp] = __popc(vote);
            __syncthreads();
            before = seen + __popc(vote & ((1u << lane) - 1));
            for (int other = 0; other < WARPS; ++other) {
                if (other < warp) before += votes[other];
                seen += votes[other];
            }
            __syncthreads();
        }
        const bool keep = none || (!every && (key > threshold.key ||
                                              (ordered_ties && tie && before >= dropped)));
        if (place >= 0) mask[first + place] = keep;
    });
    add_to_counter(nan, count);
}

// Every weight counts those of its `size` columns that come before it.
extern "C" __global__ void __launch_bounds__(THREADS)
    select_groups(const ELEM* __restrict__ weight, const float* __restrict__ scale,
                  const float* __restrict__ grad, float alpha, int kind, i64 columns,
                  u8* __restrict__ mask, u64* __restrict__ nan, i64 numel, i64 size, i64 drop) {
    const Score score{weight, scale, grad, alpha, kind};
    const i64 first = i64(blockIdx.x) * EACH;
    u32 count = 0, ignored = 0;
    for (i64 i = first + threadIdx.x; i < min(first + EACH, numel); i += THREADS) {
        const i64 place = i % size, column = i % columns;
        const int own = score.key(i, column, count);
        i64 before = 0;
        for (i64 j = 0; j < size; ++j) {
            const int other = score.key(i - place + j, column - place + j, ignored);
            before += other < own || (other == own && j < place);
        }
        mask[i] = before >= drop;
    }
    add_to_counter(nan, count);
}
