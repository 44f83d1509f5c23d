// Scores of weights, and selections among them. Which weights stay is bit-equal to the CPU: scores
// are the same products of float32, and a choice is a matter of integers.
#include "score.cuh"

constexpr int EACH = 2048; // elements of a block of the kernels that work on each by itself
// On a multiprocessor. More of them would leave too few registers.
constexpr int BLOCKS = 4;
constexpr int BINS = THREADS; // a thread for each

extern "C" __global__ void __launch_bounds__(THREADS)
    score_weights(const ELEM* __restrict__ weight, const float* __restrict__ scale,
                  const float* __restrict__ grad, float alpha, int kind, i64 columns,
                  float* __restrict__ out, i64 numel) {
    const Score score{weight, scale, grad, alpha, kind};
    const i64 first = i64(blockIdx.x) * EACH;
    for (i64 i = first + threadIdx.x; i < min(first + EACH, numel); i += THREADS)
        out[i] = score.at(i, i % columns);
}

// The key of a rank, and how many are less and the same.
struct Threshold {
    u32 key;
    u32 less, equal;
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

// A block for each row.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    select_rows(const ELEM* __restrict__ weight, const float* __restrict__ scale,
                 const float* __restrict__ grad, float alpha, int kind, i64 columns,
                 u8* __restrict__ mask, u64* __restrict__ nan, i64 drop) {
    __shared__ u32 votes[WARPS];
    const i64 first = i64(blockIdx.x) * columns;
    const Span all{{weight, scale, grad, alpha, kind}, first, columns, columns};
    const bool every = drop >= columns, none = drop == 0;
    Threshold threshold{0, 0, 0};
    if (!every && !none) threshold = threshold_of(all, u32(drop - 1));
    const u32 dropped = u32(drop) - threshold.less;
    const bool ordered_ties = !every && !none && dropped < threshold.equal;
    u32 seen = 0, count = 0;
    all.each(count, [&](i64 place, u32 key) {
        const bool tie = place >= 0 && key == threshold.key;
        const u32 before = ordered_ties ? ties_before(tie, seen, votes) : 0;
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
