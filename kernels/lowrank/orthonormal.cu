// Orthonormal columns by CholeskyQR (Fukaya et al. 2014, CholeskyQR2) with everything of the Gram
// matrix's size in float64. Columns that depend on those before them are marked, not refused.
// One block: 256 threads, squares of 32 x 32; `squares` is ld / 32.
#include "linalg.cuh"
#include "philox.cuh"
#include "random.cuh"
#include "state.cuh"

// Of a column's square, what has to be left of it beside those before it: float32 products lose
// about a millionth of a column.
constexpr double INDEPENDENT = 1e-12;

// One of the runs (y) of a square (x, of the lower triangle) of z^T z, z [rows, width] by rows;
// parts is [runs, ld, ld].
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    gram(const float* __restrict__ z, double* __restrict__ parts, i64 rows, int width, int ld,
         i64 rows_per_run, int* flags, double* numbers, int stages) {
    __shared__ Square left, right;
    if (!runs(flags, stages)) return;
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < MAX_SWEEPS)
        if (threadIdx.x >= DEVIATION) numbers[threadIdx.x] = 0.0; // gram_reduce and others raise it
    const int2 place = place_in_triangle(int(blockIdx.x));
    const i64 first = blockIdx.y * rows_per_run, end = min(rows, first + rows_per_run);
    Quarter sum;
    for (i64 row = first; row < end; row += SIDE) {
        left.load(z + row * width, width, place.x * SIDE, end - row);
        right.load(z + row * width, width, place.y * SIDE, end - row);
        __syncthreads();
        sum.multiply<true, false>(left, right);
        __syncthreads();
    }
    double* const part = parts + i64(blockIdx.y) * ld * ld;
    sum.store(part + i64(place.x) * SIDE * ld + place.y * SIDE, ld);
}

// Adds the runs in their order. One thread for each element of gram [ld, ld], which becomes
// symmetric; rows beyond `width` are the identity's, and so is all of `identity`. `inverse`
// [width, width] becomes zero, unless it is null.
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    gram_reduce(const double* __restrict__ parts, double* __restrict__ gram,
                double* __restrict__ identity, float* __restrict__ inverse,
                double* __restrict__ diagonal, int width, int ld, int runs_of_rows, int* flags,
                double* numbers, int stages) {
    if (!runs(flags, stages)) return;
    const i64 at = i64(blockIdx.x) * SQUARE_THREADS + threadIdx.x;
    const int row = int(at / ld), column = int(at % ld);
    const double unit = row == column ? 1.0 : 0.0;
    const bool real = row < width && column < width;
    double sum = unit;
    if (real) {
        sum = 0.0;
        const i64 lower = i64(max(row, column)) * ld + min(row, column);
        for (int run = 0; run < runs_of_rows; ++run) sum += parts[i64(run) * ld * ld + lower];
        if (inverse) inverse[i64(row) * width + column] = 0.0f;
        if (!(fabs(sum) < __longlong_as_double(0x7ff0'0000'0000'0000))) atomicOr(&flags[FAILED], 1);
    }
    gram[at] = sum;
    identity[at] = unit;
    if (row == column) diagonal[row] = sum;
    raise(&numbers[DEVIATION], fabs(sum - unit));
    raise(&numbers[LARGEST], real && row == column ? sum : 0.0);
}

// Factors the square `s` into l l^T and inverts l, a column a turn. A dependent column of l is
// zero, and so is its row of the inverse. Returns the smallest share of a pivot in `diagonal`.
__device__ double factor(Square& s, Square& inverse, const double* diagonal, int* dependent) {
    __shared__ double pivots[2];
    const int x = int(threadIdx.x) % SIDE, y = int(threadIdx.x) / SIDE;
    for (int r = y; r < SIDE; r += 8) inverse.at[r][x] = r == x ? 1.0 : 0.0;
    double smallest = 1.0;
    for (int c = 0; c < SIDE; ++c) {
        if (threadIdx.x == 0) pivots[c % 2] = s.at[c][c];
        __syncthreads();
        const double pivot = pivots[c % 2], share = pivot / diagonal[c];
        const bool is_dependent = !(share > INDEPENDENT); // a column of zeros has a share of NaN
        const double scale = is_dependent ? 0.0 : 1.0 / sqrt(pivot);
        smallest = is_dependent ? 0.0 : min(smallest, share);
        if (threadIdx.x == 0) dependent[c] = is_dependent;
        if (y == 0 && x >= c) s.at[x][c] *= scale;
        if (y == 1 && x <= c) inverse.at[c][x] *= scale;
        __syncthreads();
        for (int r = y; r < SIDE; r += 8) {
            if (r <= c) continue;
            if (x > c && x <= r) s.at[r][x] = fma(-s.at[r][c], s.at[x][c], s.at[r][x]);
            if (x <= c) inverse.at[r][x] = fma(-s.at[r][c], inverse.at[c][x], inverse.at[r][x]);
        }
        // The next pivot is read by its own writer's barrier: the loop's first one.
        __syncthreads();
    }
    return smallest;
}

// Step k of a blocked Cholesky factorization of a = l l^T that carries b = l^-1 along, which began
// as the identity. Blocks: squares - 1 - k rows of a below the diagonal (l_ik = a_ik l_kk^-T), then
// k + 1 squares of row k of b, which also go to `inverse` = l^-T [width, width] in float32. All
// factor the square on the diagonal for themselves.
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    cholesky_panel(double* __restrict__ a, double* __restrict__ b,
                   const double* __restrict__ diagonal, float* __restrict__ inverse,
                   int* __restrict__ dependent, int width, int ld, int k, const int* flags,
                   double* numbers, int stages) {
    __shared__ Square square, l_inverse;
    __shared__ int marks[SIDE];
    if (!runs(flags, stages)) return;
    const int below = ld / SIDE - 1 - k;
    const i64 row = i64(k) * SIDE;
    square.load(a + row * ld + row, ld);
    __syncthreads();
    const double smallest = factor(square, l_inverse, diagonal + row, marks);
    const int number = int(blockIdx.x);
    if (number < below) {
        double* const mine = a + (row + (number + 1) * SIDE) * ld + row;
        square.load(mine, ld);
        __syncthreads();
        Quarter product;
        product.multiply<false, true>(square, l_inverse);
        product.store(mine, ld);
        return;
    }
    const i64 column = i64(number - below) * SIDE;
    double* const mine = b + row * ld + column;
    square.load(mine, ld);
    __syncthreads();
    Quarter product;
    product.multiply<false, false>(l_inverse, square);
    product.store(mine, ld);
    for (int i = 0; i < 4; ++i) {
        const i64 r = row + product.row(i / 2), c = column + product.column(i % 2);
        if (r < width && c < width) inverse[c * width + r] = float(product.at[i / 2][i % 2]);
    }
    if (number > below) return; // one of them tells
    const i64 at = row + threadIdx.x;
    if (threadIdx.x < SIDE && at < width) dependent[at] = marks[threadIdx.x];
    if (threadIdx.x == 0) numbers[PIVOT] = k == 0 ? smallest : min(numbers[PIVOT], smallest);
}

// The rest of step k, for s = squares - 1 - k: the s (s + 1) / 2 squares of a that are left
// (a_ij -= l_ik l_jk^T), then s (k + 1) of b below row k (b_ij -= l_ik b_kj).
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    cholesky_update(double* __restrict__ a, double* __restrict__ b, int ld, int k, const int* flags,
                    int stages) {
    __shared__ Square left, right;
    if (!runs(flags, stages)) return;
    const int below = ld / SIDE - 1 - k, in_a = below * (below + 1) / 2;
    const int number = int(blockIdx.x), in_b = number - in_a;
    const bool is_a = number < in_a;
    const int2 place = is_a ? place_in_triangle(number) : make_int2(in_b / (k + 1), in_b % (k + 1));
    const i64 row = i64(k + 1 + place.x) * SIDE, step = i64(k) * SIDE;
    const i64 column = i64(is_a ? k + 1 + place.y : place.y) * SIDE;
    left.load(a + row * ld + step, ld);
    right.load(is_a ? a + column * ld + step : b + step * ld + column, ld);
    __syncthreads();
    Quarter product;
    if (is_a) product.multiply<false, true>(left, right);
    else product.multiply<false, false>(left, right);
    product.subtract_from((is_a ? a : b) + row * ld + column, ld);
}

// to = from [rows, width], with unit random columns in place of dependent ones. `first` tells
// passes' random numbers apart. One thread for each element.
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    replace_dependent(const float* __restrict__ from, float* __restrict__ to,
                      const int* __restrict__ dependent, i64 rows, int width, Key key, i64 first,
                      const int* flags, int stages) {
    if (!runs(flags, stages)) return;
    const i64 at = i64(blockIdx.x) * SQUARE_THREADS + threadIdx.x;
    if (at >= rows * width) return;
    const float scale = 1.0f / sqrtf(float(rows));
    to[at] = dependent[at % width] ? scale * random_at(key, first + at) : from[at];
}
