// Eigenvectors of a small symmetric matrix in float64 by Jacobi's method in blocks (Golub and Van
// Loan, Matrix Computations, section 8.5): a round pairs all blocks of 16 rows, a sweep has as many
// rounds as it takes every pair to meet, and every launch is one round. Rotations are judged by
// |a_ij| against the root of a_ii a_jj, which keeps small eigenvalues of positive matrices.
#include "linalg.cuh"
#include "state.cuh"

constexpr int HALF = SIDE / 2; // rows of a block
// A sweep that found everything this near to diagonal has left nothing: convergence is quadratic.
constexpr double CONVERGED = 1e-12; // of a square
// Against the largest of the diagonal: what rounding leaves anyway.
constexpr double NOTHING = 2e-16;
// A direction with this share of the squares it is made of is rounding.
constexpr double INDEPENDENT = 4e-14;

// Pair `number` of round `round` among `count` players, an even number (the circle method).
__device__ __forceinline__ int2 pair_of(int number, int round, int count) {
    const int others = count - 1;
    const int first = number == 0 ? others : (round + number) % others;
    const int second = (round + others - number) % others;
    return make_int2(min(first, second), max(first, second));
}

// Row of the matrix behind row `i` of a pair of blocks.
__device__ __forceinline__ int row_of(int2 pair, int i) {
    return (i < HALF ? pair.x : pair.y) * HALF + i % HALF;
}

__device__ __forceinline__ bool is_done(const double* numbers, int sweep) {
    return sweep > 0 && numbers[SWEEPS + sweep - 1] <= CONVERGED;
}

// The pair's rows and columns of a symmetric matrix.
__device__ __forceinline__ void gather(Square& to, const double* a, int ld, int2 rows,
                                       int2 columns) {
    const int c = int(threadIdx.x) % SIDE;
    for (int r = int(threadIdx.x) / SIDE; r < SIDE; r += SQUARE_THREADS / SIDE)
        to.at[r][c] = a[i64(row_of(rows, r)) * ld + row_of(columns, c)];
}

// |a_ij|^2 / (a_ii a_jj) of one element, 0 for what is nothing.
__device__ __forceinline__ double off_diagonal(double ij, double ii, double jj, double nothing) {
    if (fabs(ij) <= nothing) return 0.0;
    return ij * ij / fabs(ii * jj);
}

struct Rotation {
    double c, s;
};

// Makes the element between p and q zero (Rutishauser's formulas).
__device__ __forceinline__ Rotation rotation_of(double pp, double qq, double pq) {
    if (fabs(pq) <= 1e-17 * sqrt(fabs(pp * qq)) || pq == 0.0) return {1.0, 0.0};
    const double tau = (qq - pp) / (2.0 * pq);
    const double t = (tau >= 0.0 ? 1.0 : -1.0) / (fabs(tau) + sqrt(fma(tau, tau, 1.0)));
    const double c = 1.0 / sqrt(fma(t, t, 1.0));
    return {c, t * c};
}

// Rotates columns p and q of row r.
__device__ __forceinline__ void rotate(double& p, double& q, Rotation by) {
    const double before = p;
    p = fma(by.c, before, -by.s * q);
    q = fma(by.s, before, by.c * q);
}

// One sweep over the 32 x 32 matrix of each pair of blocks: `rotations` [pairs, 32, 32] takes it
// nearer to diagonal. A block of 256 threads for each pair, a thread for each 2 x 2 of a turn.
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    jacobi_solve(const double* __restrict__ a, double* __restrict__ rotations,
                 int* __restrict__ rotated, int ld, int round, int sweep, const int* flags,
                 double* numbers, int stages) {
    __shared__ Square s, w;
    __shared__ Rotation turns[HALF];
    __shared__ int any;
    if (!runs(flags, stages) || is_done(numbers, sweep)) return;
    const int2 mine = pair_of(int(blockIdx.x), round, 2 * int(gridDim.x));
    gather(s, a, ld, mine, mine);
    const int x = int(threadIdx.x) % HALF, y = int(threadIdx.x) / HALF;
    for (int i = 0; i < 4; ++i) {
        const int r = y + i / 2 * HALF, c = x + i % 2 * HALF;
        w.at[r][c] = r == c ? 1.0 : 0.0;
    }
    if (threadIdx.x == 0) any = 0;
    __syncthreads();
    double off = 0.0;
    for (int i = 0; i < 4; ++i) {
        const int r = y + i / 2 * HALF, c = x + i % 2 * HALF;
        if (r == c) continue;
        const double one =
            off_diagonal(s.at[r][c], s.at[r][r], s.at[c][c], NOTHING * numbers[LARGEST]);
        off = one > off ? one : off;
    }
    raise(&numbers[SWEEPS + sweep], off);
    for (int turn = 0; turn < SIDE - 1; ++turn) {
        if (threadIdx.x < HALF) {
            const int2 p = pair_of(int(threadIdx.x), turn, SIDE);
            turns[threadIdx.x] = rotation_of(s.at[p.x][p.x], s.at[p.y][p.y], s.at[p.x][p.y]);
            if (turns[threadIdx.x].s != 0.0) any = 1;
        }
        __syncthreads();
        const int2 p = pair_of(y, turn, SIDE), q = pair_of(x, turn, SIDE);
        const Rotation left = turns[y], right = turns[x];
        double pp = s.at[p.x][q.x], pq = s.at[p.x][q.y], qp = s.at[p.y][q.x], qq = s.at[p.y][q.y];
        rotate(pp, qp, left);
        rotate(pq, qq, left);
        rotate(pp, pq, right);
        rotate(qp, qq, right);
        if (x == y && left.s != 0.0) pq = qp = 0.0;
        s.at[p.x][q.x] = pp, s.at[p.x][q.y] = pq, s.at[p.y][q.x] = qp, s.at[p.y][q.y] = qq;
        for (int r = y; r < SIDE; r += HALF) rotate(w.at[r][q.x], w.at[r][q.y], right);
        __syncthreads();
    }
    if (threadIdx.x == 0) rotated[blockIdx.x] = any;
    double* const to = rotations + i64(blockIdx.x) * SIDE * SIDE;
    for (int i = 0; i < 4; ++i) {
        const int r = y + i / 2 * HALF, c = x + i % 2 * HALF;
        to[r * SIDE + c] = w.at[r][c];
    }
}

// Applies a round: a = w^T a w and v = v w. Blocks: first the pairs of pairs of a's lower triangle,
// each of which also stores its mirror image, then 32 rows of v by one pair; `pairs` of each.
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    jacobi_update(double* __restrict__ a, double* __restrict__ v,
                  const double* __restrict__ rotations, const int* __restrict__ rotated, int ld,
                  int pairs, int round, int sweep, const int* flags, const double* numbers,
                  int stages) {
    __shared__ Square square, w;
    if (!runs(flags, stages) || is_done(numbers, sweep)) return;
    const int number = int(blockIdx.x), in_a = pairs * (pairs + 1) / 2;
    const bool is_a = number < in_a;
    const int2 place = is_a ? place_in_triangle(number)
                            : make_int2((number - in_a) / pairs, (number - in_a) % pairs);
    if (!rotated[place.y] && !(is_a && rotated[place.x])) return;
    const int2 columns = pair_of(place.y, round, 2 * pairs);
    const int2 rows = is_a ? pair_of(place.x, round, 2 * pairs)
                           : make_int2(2 * place.x, 2 * place.x + 1);
    double* const matrix = is_a ? a : v;
    gather(square, matrix, ld, rows, columns);
    w.load(rotations + place.y * SIDE * SIDE, SIDE);
    __syncthreads();
    Quarter product;
    product.multiply<false, false>(square, w);
    if (is_a) {
        __syncthreads(); // both have been read
        product.put(square);
        w.load(rotations + place.x * SIDE * SIDE, SIDE);
        __syncthreads();
        product = {};
        product.multiply<true, false>(w, square);
    }
    const bool on_diagonal = is_a && place.x == place.y;
    for (int i = 0; i < 4; ++i) {
        const int r = product.row(i / 2), c = product.column(i % 2);
        if (on_diagonal && r < c) continue;
        const i64 row = row_of(rows, r), column = row_of(columns, c);
        matrix[row * ld + column] = product.at[i / 2][i % 2];
        if (is_a) matrix[column * ld + row] = product.at[i / 2][i % 2];
    }
}

// Puts eigenvectors in the order of their eigenvalues, the largest first, ties by the lower index:
// `rotation` [width, width] in float32, `values` [width]. With `scaled`, the eigenvectors of a Gram
// matrix z^T z with the squares `diagonal` are divided by their singular value, so that z rotation
// has orthonormal columns (SVQB, Stathopoulos and Wu 2002); those of mere rounding become zero and
// are marked as dependent. One block of 256 threads for each eigenvector.
extern "C" __global__ void __launch_bounds__(SQUARE_THREADS)
    eigen_order(const double* __restrict__ a, const double* __restrict__ v,
                const double* __restrict__ diagonal, double* __restrict__ values,
                float* __restrict__ rotation, int* __restrict__ dependent, int width, int ld,
                int scaled, const int* flags, int stages) {
    if (!runs(flags, stages)) return;
    const int mine = int(blockIdx.x);
    const double value = a[i64(mine) * ld + mine];
    double before = 0.0, square = 0.0; // eigenvalues that come first, squares of what is summed
    for (int i = int(threadIdx.x); i < width; i += SQUARE_THREADS) {
        const double other = a[i64(i) * ld + i], part = v[i64(i) * ld + mine];
        if (other > value || (other == value && i < mine)) before += 1.0;
        square = fma(part * part, diagonal[i], square);
    }
    const int place = int(sum_of_block(before));
    square = sum_of_block(square);
    const bool is_rounding = scaled && !(value > INDEPENDENT * square);
    const double scale = is_rounding ? 0.0 : scaled ? 1.0 / sqrt(value) : 1.0;
    for (int i = int(threadIdx.x); i < width; i += SQUARE_THREADS)
        rotation[i64(i) * width + place] = float(v[i64(i) * ld + mine] * scale);
    if (threadIdx.x > 0) return;
    values[place] = value;
    dependent[place] = is_rounding;
}
