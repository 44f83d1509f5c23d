// The selection among all weights of a matrix, or of several: counts of the keys by one digit after
// the other narrow the threshold down, then every weight is compared with it. All of it is a matter
// of integers, and in the order of the weights: bit-equal to the CPU however blocks are scheduled.
#include "score.cuh"

constexpr int SPAN = 8192; // weights of a block
constexpr int DIGIT = 11;  // bits of the first two digits; the third has the ten that are left
constexpr int BINS = 1 << DIGIT;
constexpr int FIRST_SHIFT = 32 - DIGIT;
constexpr i64 ALL = 0x7fff'ffff'ffff'ffff;

// Where a selection is: the bits of the threshold's key that are known, and then its rank among the
// keys that have them; or, once all are known, how many of the keys that equal it are to be
// dropped, and of how many.
struct State {
    i64 key, rank, equal;

    // Nothing depends on the order of those that are equal.
    __device__ bool decided() const { return rank == 0 || rank == equal; }
};

__device__ __forceinline__ State state_at(const i64* state) {
    return {state[0], state[1], state[2]};
}

__device__ __forceinline__ Span span_of_block(const Score& score, i64 columns, i64 numel) {
    const i64 first = i64(blockIdx.x) * SPAN;
    return {score, first, min(i64(SPAN), numel - first), columns};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    score_histogram(const ELEM* __restrict__ weight, const float* __restrict__ scale,
                    const float* __restrict__ grad, float alpha, int kind, i64 columns,
                    const i64* __restrict__ state, u64* __restrict__ counts, i64 numel,
                    int shift) {
    __shared__ u32 bins[BINS];
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) bins[bin] = 0;
    __syncthreads();
    const Span span = span_of_block({weight, scale, grad, alpha, kind}, columns, numel);
    const u32 prefix = u32(state[0]);
    const int bits = shift ? DIGIT : 32 - 2 * DIGIT;
    u32 ignored = 0;
    span.each(ignored, [&](i64 place, u32 key) {
        const bool same = shift == FIRST_SHIFT || (key ^ prefix) >> (shift + bits) == 0;
        if (place >= 0 && same) atomicAdd(&bins[key >> shift & ((1 << bits) - 1)], 1u);
    });
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
        if (bins[bin]) atomicAdd(&counts[bin], u64(bins[bin]));
}

// One block: the digit that the wanted key has, and zeros for the counts of the next.
extern "C" __global__ void __launch_bounds__(THREADS)
    narrow_threshold(i64* __restrict__ state, i64* __restrict__ counts, int shift, i64 rank,
                     int through) {
    constexpr int OWN = BINS / THREADS;
    __shared__ i64 totals[WARPS];
    const i64 prefix = state[0];
    const i64 wanted = shift == FIRST_SHIFT ? rank : state[1];
    i64* bins = counts + threadIdx.x * OWN;
    i64 sum = 0;
    for (int i = 0; i < OWN; ++i) sum += bins[i];
    const i64 end = inclusive_sum(sum, totals);
    i64 less = end - sum;
    const bool here = less <= wanted && wanted < end;
    for (int i = 0; i < OWN; ++i) {
        const i64 count = bins[i];
        bins[i] = 0;
        if (here && less <= wanted && wanted < less + count) {
            const i64 left = wanted - less;
            state[0] = prefix | i64(threadIdx.x * OWN + i) << shift;
            state[1] = shift ? left : through ? count : left + 1;
            state[2] = count;
        }
        less += count;
    }
}

// How many keys of each block equal the threshold, where it matters.
extern "C" __global__ void __launch_bounds__(THREADS)
    count_ties(const ELEM* __restrict__ weight, const float* __restrict__ scale,
               const float* __restrict__ grad, float alpha, int kind, i64 columns,
               const i64* __restrict__ state, u64* __restrict__ ties, i64 numel) {
    __shared__ u32 totals[WARPS];
    const State now = state_at(state);
    if (now.decided()) return;
    const Span span = span_of_block({weight, scale, grad, alpha, kind}, columns, numel);
    u32 ignored = 0, count = 0;
    span.each(ignored, [&](i64 place, u32 key) { count += place >= 0 && key == u32(now.key); });
    const u32 sum = inclusive_sum(count, totals);
    if (threadIdx.x == THREADS - 1) ties[blockIdx.x] = sum;
}

// One block: how many of the ties from each block of weights on are dropped, and what is left for
// the next matrix.
extern "C" __global__ void __launch_bounds__(THREADS)
    spread_ties(i64* __restrict__ state, i64* __restrict__ ties, i64 blocks) {
    __shared__ i64 totals[WARPS], whole;
    const State now = state_at(state);
    const bool decided = now.decided();
    i64 seen = 0;
    for (i64 base = 0; base < blocks; base += THREADS) {
        const i64 block = base + threadIdx.x;
        const i64 count = !decided && block < blocks ? ties[block] : 0;
        const i64 end = inclusive_sum(count, totals);
        if (threadIdx.x == THREADS - 1) whole = end;
        __syncthreads();
        const i64 left = max(now.rank - seen - (end - count), i64(0));
        if (block < blocks) ties[block] = !decided ? left : now.rank ? ALL : 0;
        seen += whole;
        __syncthreads();
    }
    if (!decided && threadIdx.x == 0) {
        state[1] = max(now.rank - seen, i64(0));
        state[2] = max(now.equal - seen, i64(0));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    select_below(const ELEM* __restrict__ weight, const float* __restrict__ scale,
                 const float* __restrict__ grad, float alpha, int kind, i64 columns,
                 const i64* __restrict__ state, const i64* __restrict__ ties,
                 u8* __restrict__ mask, u64* __restrict__ nan, i64 numel) {
    __shared__ u32 votes[WARPS];
    const Span span = span_of_block({weight, scale, grad, alpha, kind}, columns, numel);
    const u32 threshold = u32(state[0]);
    const i64 left = ties[blockIdx.x];
    const bool every = left >= SPAN, some = left > 0 && !every;
    u32 seen = 0, count = 0;
    span.each(count, [&](i64 place, u32 key) {
        const bool tie = place >= 0 && key == threshold;
        const u32 before = some ? ties_before(tie, seen, votes) : 0;
        const bool dropped = every || (some && before < left);
        if (place >= 0) mask[span.first + place] = key > threshold || (tie && !dropped);
    });
    add_to_counter(nan, count);
}
