// The small kernels of a subspace's refresh (src/lowrank/refresh.rs; the randomized range finder of
// Halko, Martinsson, Tropp 2011, arXiv 0909.4061): norms, random matrices, scaling, decisions, and
// the result. The order of launches, products included, is in README.md.
#include "linalg.cuh"
#include "random.cuh"
#include "reduce.cuh"
#include "state.cuh"

constexpr int THREADS = SQUARE_THREADS;
constexpr int PROBES = 4; // random vectors that the captured energy is measured with

// How far a Gram matrix may be from the identity for one more pass to leave rounding alone.
constexpr double NEARLY = 1e-2;
// Share of a column's square beside the others that one rough pass copes with.
constexpr double WELL_CONDITIONED = 1e-4;

// A block's part of the sum of squares: partial[b] is over one of gridDim.x equal runs of x.
template <class T>
__device__ __forceinline__ void sum_squares(const T* x, double* partial, i64 count) {
    const i64 run = (count + 4 * gridDim.x - 1) / (4 * gridDim.x) * 4;
    const i64 end = min(count, (blockIdx.x + 1) * run);
    double sum = 0.0;
    for (i64 at = blockIdx.x * run + 4 * threadIdx.x; at < end; at += 4 * THREADS) {
        float values[4];
        load_four(x + at, end - at, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum = fma(double(values[j]), double(values[j]), sum);
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Of the gradient.
extern "C" __global__ void __launch_bounds__(THREADS)
    square_norm(const ELEM* __restrict__ x, double* __restrict__ partial, i64 count) {
    sum_squares(x, partial, count);
}

// Of a float32 matrix.
extern "C" __global__ void __launch_bounds__(THREADS)
    captured_norm(const float* __restrict__ x, double* __restrict__ partial, i64 count,
                  const int* flags, int stages) {
    if (runs(flags, stages)) sum_squares(x, partial, count);
}

__device__ __forceinline__ double sum_partials(const double* partial, int parts) {
    double sum = 0.0;
    for (int i = int(threadIdx.x); i < parts; i += THREADS) sum += partial[i];
    return sum_of_block(sum);
}

enum Mode { COLD, WARM, SVD };

// Begins a refresh from the partial sums of square_norm, `share` of which is the squared norm:
// writes all of `flags` and `numbers`. For an SVD a matrix of zeros is one like others. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    refresh_begin(const double* __restrict__ partial, int parts, int mode, float share, int* flags,
                  double* numbers) {
    const double square = double(share) * sum_partials(partial, parts);
    const double nan = __longlong_as_double(0x7ff8'0000'0000'0000);
    if (threadIdx.x < 32) numbers[threadIdx.x] = 0.0;
    if (threadIdx.x < 8) flags[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x > 0) return;
    const bool is_finite = square < __longlong_as_double(0x7ff0'0000'0000'0000);
    const bool is_zero = square == 0.0 && mode != SVD;
    flags[STATUS] = !is_finite ? KEPT : is_zero ? ZERO_GRADIENT : REFRESHED;
    flags[ACTIVE] = flags[STATUS] != REFRESHED ? 0 : mode == WARM ? MAIN : MAIN | FRESH;
    numbers[SQUARE_NORM] = square;
    numbers[ENERGY] = numbers[COSINE] = nan;
}

// A random matrix of `count` elements. A thread has the eight that share its random words.
extern "C" __global__ void __launch_bounds__(THREADS)
    random_matrix(float* __restrict__ out, i64 count, Key key, const int* flags, int stages) {
    if (!runs(flags, stages)) return;
    const i64 block = (i64(blockIdx.x) * THREADS + threadIdx.x) / 32;
    u32 dithers[8];
    dithers_of_lane(key, block, dithers);
#pragma unroll
    for (int half = 0; half < 8; ++half) {
        const i64 element = block * 256 + half * 32 + threadIdx.x % 32;
        if (element < count) out[element] = random_of_dither(dithers[half]);
    }
}

// What a warm start multiplies: out [rows, width] is the earlier basis [rows, rank], then unit
// random columns, by which directions come in that the gradient did not have before. One thread for
// each element.
extern "C" __global__ void __launch_bounds__(THREADS)
    start_basis(const float* __restrict__ basis, float* __restrict__ out, i64 rows, int rank,
                int width, Key key, const int* flags, int stages) {
    if (!runs(flags, stages)) return;
    const i64 at = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= rows * width) return;
    const i64 row = at / width;
    const int column = int(at % width);
    out[at] = column < rank ? basis[row * rank + column]
                            : random_at(key, at) / sqrtf(float(rows));
}

// partial[b] is the bits of the largest magnitude of one of gridDim.x equal runs of x.
extern "C" __global__ void __launch_bounds__(THREADS)
    largest_magnitude(const float* __restrict__ x, u32* __restrict__ partial, i64 count,
                      const int* flags, int stages) {
    __shared__ u32 parts[MAX_WARPS];
    if (!runs(flags, stages)) return;
    const i64 run = (count + gridDim.x - 1) / gridDim.x;
    const i64 end = min(count, (blockIdx.x + 1) * run);
    u32 largest = 0;
    for (i64 at = blockIdx.x * run + threadIdx.x; at < end; at += THREADS)
        largest = max(largest, __float_as_uint(x[at]) & MAGNITUDE);
    largest = max_of_lanes(largest, 32);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < MAX_WARPS; ++warp) largest = max(largest, parts[warp]);
    partial[blockIdx.x] = largest;
}

// Multiplies x by a power of two, from the parts of largest_magnitude, so that products of tiny and
// of huge matrices stay in the range of float32. The largest magnitude becomes about one; or, if
// the matrix that made x multiplies it again (`twice`), such that the result does.
// Block: a grid's share of x.
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_to_unit(float* __restrict__ x, const u32* __restrict__ partial, int parts, i64 count,
                  int twice, const int* flags, int stages) {
    __shared__ u32 all[THREADS];
    if (!runs(flags, stages)) return;
    u32 largest = 0;
    for (int i = int(threadIdx.x); i < parts; i += THREADS) largest = max(largest, partial[i]);
    all[threadIdx.x] = largest;
    __syncthreads();
    for (int i = 0; i < THREADS; ++i) largest = max(largest, all[i]);
    const double value = double(__uint_as_float(largest));
    if (value == 0.0 || largest >= EXPONENT) return; // whatever follows finds out
    const int exponent = int(__double_as_longlong(value) >> 52) - 1023;
    const int target = twice ? min(max(-exponent, -60), 60) : 0;
    const double factor = __longlong_as_double(i64(1023 + target - exponent) << 52);
    const i64 step = i64(gridDim.x) * THREADS;
    for (i64 at = i64(blockIdx.x) * THREADS + threadIdx.x; at < count; at += step)
        x[at] = float(double(x[at]) * factor);
}

enum Decision {
    ANOTHER_PASS, // before passes
    LOOK_AT_WARM, // after an earlier basis was tried: start afresh when it left out a column
    ROUGH_DONE,   // after a pass of a basis that is multiplied further
    EXACT_DONE,   // after a pass of the basis itself
    LAST,         // after the last pass
};

// What goes on, from what the last launches found. `dependent` marks columns, of which the first
// `columns` count. One block of 32.
extern "C" __global__ void __launch_bounds__(32)
    refresh_decide(int decision, const int* __restrict__ dependent, int columns, int* flags,
                   const double* __restrict__ numbers) {
    if (!runs(flags, MAIN)) return;
    bool mine = false;
    for (int i = int(threadIdx.x); i < columns; i += 32) mine = mine || dependent[i] != 0;
    const bool any = __any_sync(FULL_WARP, mine);
    if (threadIdx.x > 0) return;
    const int active = flags[ACTIVE];
    const bool nearly = numbers[DEVIATION] < NEARLY;
    if (flags[FAILED] || (decision == LAST && active & PASS)) {
        flags[ACTIVE] = 0;
        flags[STATUS] = KEPT;
    } else if (decision == ANOTHER_PASS) {
        flags[ACTIVE] = active | PASS;
    } else if (decision == LOOK_AT_WARM) {
        if (any) flags[ACTIVE] = active | FRESH;
    } else if (decision == ROUGH_DONE) {
        if (nearly || numbers[PIVOT] > WELL_CONDITIONED) flags[ACTIVE] = active & ~PASS;
    } else if (decision == EXACT_DONE) {
        if (nearly) flags[ACTIVE] = active & ~PASS;
    }
}

// Sign that makes the column's entry of largest magnitude positive, a tie going to the lower row;
// eight threads, `lane` of them this one, look at a column.
__device__ __forceinline__ float canonical_sign(const float* z, i64 rows, int width, int column,
                                                bool is_real, int lane) {
    __shared__ float best[8][32];
    __shared__ i64 where[8][32];
    const int x = int(threadIdx.x) % 32;
    float largest = 0.0f;
    i64 at = rows;
    for (i64 row = lane; is_real && row < rows; row += 8) {
        const float value = z[row * width + column];
        if (fabsf(value) > fabsf(largest)) largest = value, at = row;
    }
    best[lane][x] = largest, where[lane][x] = at;
    __syncthreads();
    for (int i = 0; i < 8; ++i) {
        const float other = fabsf(best[i][x]), own = fabsf(largest);
        if (other > own || (other == own && where[i][x] < at))
            largest = best[i][x], at = where[i][x];
    }
    return largest < 0.0f ? -1.0f : 1.0f;
}

// The first `rank` columns of z [rows, width] become the basis [rows, rank], the first of them
// `vector` [rows]. Without a result the earlier basis stays, or unit vectors where there is none.
// A block of 32 x 8 threads for each 32 columns.
extern "C" __global__ void __launch_bounds__(THREADS)
    refresh_commit(const float* __restrict__ z, float* __restrict__ basis,
                   float* __restrict__ vector, i64 rows, int rank, int width, int warm,
                   const int* __restrict__ flags, double* numbers) {
    const int lane = int(threadIdx.x) / 32, column = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
    const bool is_real = column < rank, is_new = runs(flags, MAIN);
    if (!is_new) {
        for (i64 row = lane; is_real && !warm && row < rows; row += 8)
            basis[row * rank + column] = row == column ? 1.0f : 0.0f;
        return;
    }
    const float sign = canonical_sign(z, rows, width, column, is_real, lane);
    for (i64 row = lane; is_real && row < rows; row += 8)
        basis[row * rank + column] = sign * z[row * width + column];
    if (blockIdx.x > 0) return;
    __shared__ float first_sign;
    if (threadIdx.x == 0) first_sign = sign;
    __syncthreads();
    double dot = 0.0, old = 0.0, now = 0.0;
    for (i64 row = threadIdx.x; row < rows; row += THREADS) {
        const float next = first_sign * z[row * width];
        if (warm) {
            const double before = vector[row];
            dot = fma(before, double(next), dot), old = fma(before, before, old);
        }
        now = fma(double(next), double(next), now);
        vector[row] = next;
    }
    dot = sum_of_block(dot), old = sum_of_block(old), now = sum_of_block(now);
    if (threadIdx.x == 0 && warm) numbers[COSINE] = double(float(dot / sqrt(old * now)));
}

// Random signs [rank, 4] for the captured energy (Hutchinson 1990). One thread for each.
extern "C" __global__ void __launch_bounds__(THREADS)
    probe_signs(float* __restrict__ out, int rank, Key key, const int* flags, int stages) {
    const int at = int(blockIdx.x) * THREADS + int(threadIdx.x);
    if (!runs(flags, stages) || at >= rank * PROBES) return;
    out[at] = philox4x32(key, u64(at)).x & 1 ? -1.0f : 1.0f;
}

// The share of the gradient's squared norm that the basis captures, from the partial sums of
// captured_norm over the probes' images. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    refresh_end(const double* __restrict__ partial, int parts, const int* __restrict__ flags,
                double* numbers) {
    if (!runs(flags, MAIN)) return;
    const double captured = sum_partials(partial, parts) / PROBES;
    if (threadIdx.x == 0) numbers[ENERGY] = min(1.0, captured / numbers[SQUARE_NORM]);
}

// What the caller reads: status, cosine, energy. One block of 32.
extern "C" __global__ void __launch_bounds__(32)
    refresh_outcome(const int* __restrict__ flags, const double* __restrict__ numbers,
                    double* __restrict__ outcome) {
    if (threadIdx.x > 0) return;
    outcome[0] = double(flags[STATUS]);
    outcome[1] = numbers[COSINE];
    outcome[2] = numbers[ENERGY];
}

// The results of an SVD of an [m, n] matrix from the singular vectors of the upright one, in the
// order of their singular values: z [short, width] right ones, `left` [long, width]. Writes u
// [m, rank], s [rank], vh [rank, n]. A block of 32 x 8 threads for each 32 columns.
extern "C" __global__ void __launch_bounds__(THREADS)
    svd_commit(const float* __restrict__ z, const float* __restrict__ left,
               const double* __restrict__ values, float* __restrict__ u, float* __restrict__ s,
               float* __restrict__ vh, i64 m, i64 n, int rank, int width,
               const int* __restrict__ flags) {
    if (!runs(flags, MAIN)) return;
    const int lane = int(threadIdx.x) / 32, column = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
    const bool is_real = column < rank;
    const float sign = canonical_sign(z, min(m, n), width, column, is_real, lane);
    if (!is_real) return;
    if (lane == 0) s[column] = float(sqrt(max(values[column], 0.0)));
    const float* const of_u = m >= n ? left : z;
    const float* const of_v = m >= n ? z : left;
    for (i64 row = lane; row < m; row += 8)
        u[row * rank + column] = sign * of_u[row * width + column];
    for (i64 row = lane; row < n; row += 8)
        vh[column * n + row] = sign * of_v[row * width + column];
}
