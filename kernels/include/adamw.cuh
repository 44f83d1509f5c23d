// AdamW over lists of tensors (src/optim/cpu.rs), for parameters and for directions.
#pragma once

#include "friction.cuh"
#include "list.cuh"
#include "maps.cuh"
#include "pack.cuh"
#include "philox.cuh"
#include "tile.cuh"

// The numbers of one tensor's step.
struct AdamNumbers {
    u32 step;
    float step_size, root; // with the bias corrections
    float keep;            // what the decay leaves of a parameter
};

struct AdamTensor {
    // Null for a direction, which overwrites `grad`, or the gradient of the step before there.
    void* param;
    void* grad;
    void* exp_avg; // float, or codes with scales
    void* exp_avg_sq;
    float* exp_avg_scale;
    float* exp_avg_sq_scale;
    i64 numel;
    u32 first_block;
    u32 tensor_id;
    union {
        AdamNumbers numbers;
        const float* counter; // where the host knows no numbers of steps
    };
};
static_assert(sizeof(AdamTensor) == 80, "as README.md says");
using AdamList = List<AdamTensor>;

// What the numbers of a step are computed from where the host does not know them.
struct AdamRates {
    double lr, beta1, beta2, weight_decay;
    const float* lr_at; // in place of `lr`, unless null
    int counted;        // whether tensors have counters
    int unused;
};

struct AdamShared {
    float beta1, beta2;
    float rest1, rest2; // one minus these, rounded once
    float eps;
    float factor; // multiplies the gradient: sign and inverse of a scale known to the host
    u32 key[2];
    int stochastic;
    Friction friction;
    int narrow; // whether gradients of the step before are bfloat16
    AdamRates rates;
};
static_assert(sizeof(AdamShared) == 104, "as README.md says");

// By repeated squaring, as `power` of src/optim/call.rs.
__device__ __forceinline__ double power(double base, u32 exponent) {
    double result = 1.0;
    for (; exponent != 0; exponent >>= 1) {
        if (exponent & 1) result *= base;
        base *= base;
    }
    return result;
}

// A counter as a number; below one it is taken for one.
__device__ __forceinline__ u32 count_of(float counter) {
    if (!(counter >= 1.0f)) return 1;
    return counter < 4294967296.0f ? u32(counter) : 0xffff'ffffu;
}

// Puts the numbers of a tensor's step where a block finds them after its next barrier. Where the
// device has to compute them, two threads do, each the correction of one moment, since float64 is
// slow on many devices; meanwhile the others load what they will step.
__device__ __forceinline__ void find_numbers(const AdamTensor& tensor, const AdamShared& shared,
                                             AdamNumbers& numbers) {
    if (threadIdx.x >= 2) return;
    const AdamRates& rates = shared.rates;
    const bool first = threadIdx.x == 0;
    if (!rates.counted && !rates.lr_at) {
        if (first) numbers = tensor.numbers;
        return;
    }
    const u32 step = rates.counted ? count_of(*tensor.counter) : tensor.numbers.step;
    const double lr = rates.lr_at ? double(*rates.lr_at) : rates.lr;
    const double correction = 1.0 - power(first ? rates.beta1 : rates.beta2, step);
    const double quotient = (first ? lr : 1.0) / (first ? correction : sqrt(correction));
    if (first) {
        numbers.step = step;
        numbers.step_size = float(quotient);
        numbers.keep = float(1.0 - lr * rates.weight_decay);
    } else numbers.root = float(quotient);
}

struct AdamStep {
    __device__ AdamStep(const AdamNumbers& numbers, const AdamTensor& tensor,
                        const AdamShared& shared, const float* grad_scale)
        : beta1(shared.beta1), beta2(shared.beta2), rest1(shared.rest1), rest2(shared.rest2),
          eps(shared.eps),
          factor(grad_scale ? shared.factor / *grad_scale : shared.factor),
          numbers(numbers),
          key{{shared.key[0], shared.key[1]}, tensor.tensor_id, numbers.step} {}

    float beta1, beta2, rest1, rest2, eps, factor;
    // In shared memory, and read anew for every element: registers are scarce.
    const volatile AdamNumbers& numbers;
    Key key; // of random numbers
};

// New moments and Adam's update; without a finite gradient the moments are the old ones.
struct Adam {
    __device__ Adam(float gradient, float m, float v, const AdamStep& step) {
        const float g = gradient * step.factor;
        scaled = g;
        const float new_m = step.beta1 * m + step.rest1 * g;
        float new_v = step.beta2 * v + step.rest2 * g * g;
        // The square of a gradient above 1e19 overflows; infinity would poison the whole block.
        new_v = new_v < 3.40282347e+38f ? new_v : 3.40282347e+38f;
        update = step.numbers.step_size * new_m / (sqrtf(new_v) * step.numbers.root + step.eps);
        finite = is_finite(g);
        exp_avg = finite ? new_m : m;
        exp_avg_sq = finite ? new_v : v;
    }

    float scaled, exp_avg, exp_avg_sq, update; // `scaled` is the gradient
    bool finite;
};

// Parameters that are stepped in place by their gradients.
template <class P, class G>
class Parameters {
public:
    static constexpr bool DITHERED = IS_BF16<P>;

    __device__ Parameters(const AdamTensor& tensor, const AdamShared& shared)
        : stochastic(DITHERED && shared.stochastic != 0), param_(static_cast<P*>(tensor.param)),
          grad_(static_cast<const G*>(tensor.grad)) {}

    __device__ void load(i64 element, int left, float (&gradient)[4], float (&old)[4]) const {
        load_four(grad_ + element, left, gradient);
        load_four(param_ + element, left, old);
    }
    __device__ void load(i64 element, float& gradient, float& old) const {
        gradient = widen(grad_[element]);
        old = widen(param_[element]);
    }
    __device__ float next(float old, const Adam& adam, float keep) const {
        return adam.finite ? old * keep - adam.update : old;
    }
    __device__ void store(i64 element, int left, const float (&values)[4],
                          const u32 (&dithers)[4]) const {
        P rounded[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) rounded[j] = round(values[j], dithers[j]);
        store_four(param_ + element, left, rounded);
    }
    __device__ void store(i64 element, float value, u32 dither) const {
        param_[element] = round(value, dither);
    }
    __device__ void remember(i64, int, const float (&)[4]) const {}
    __device__ void remember(i64, float) const {}

    bool stochastic;

private:
    __device__ P round(float value, u32 dither) const {
        if constexpr (DITHERED)
            if (stochastic) return narrow_stochastic(value, dither);
        return narrow<P>(value);
    }

    P* param_;
    const G* grad_;
};

// Gradients that become updates without decay; zero where they are not finite. Where the gradient
// of the step before is given, less of the update is taken, and this gradient takes its place.
class Directions {
public:
    static constexpr bool DITHERED = false;

    __device__ Directions(const AdamTensor& tensor, const AdamShared& shared)
        : grad_(static_cast<float*>(tensor.grad)), before_(tensor.param),
          friction_(shared.friction), narrow_(shared.narrow != 0) {}

    __device__ void load(i64 element, int left, float (&gradient)[4], float (&old)[4]) const {
        load_four(grad_ + element, left, gradient);
        if (!before_)
#pragma unroll
            for (int j = 0; j < 4; ++j) old[j] = 0.0f;
        else if (narrow_) load_four(static_cast<const bf16*>(before_) + element, left, old);
        else load_four(static_cast<const float*>(before_) + element, left, old);
    }
    __device__ void load(i64 element, float& gradient, float& old) const {
        gradient = grad_[element];
        if (!before_) old = 0.0f;
        else if (narrow_) old = widen(static_cast<const bf16*>(before_)[element]);
        else old = static_cast<const float*>(before_)[element];
    }
    __device__ float next(float old, const Adam& adam, float) const {
        if (!adam.finite) return 0.0f;
        return before_ ? -adam.update * friction_.of(old - adam.scaled) : -adam.update;
    }
    __device__ void remember(i64 element, int left, const float (&gradient)[4]) const {
        if (!before_) return;
        if (!narrow_) return store_four(static_cast<float*>(before_) + element, left, gradient);
        bf16 rounded[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) rounded[j] = narrow<bf16>(gradient[j]);
        store_four(static_cast<bf16*>(before_) + element, left, rounded);
    }
    __device__ void remember(i64 element, float gradient) const {
        if (!before_) return;
        if (narrow_) static_cast<bf16*>(before_)[element] = narrow<bf16>(gradient);
        else static_cast<float*>(before_)[element] = gradient;
    }
    __device__ void store(i64 element, int left, const float (&values)[4],
                          const u32 (&)[4]) const {
        store_four(grad_ + element, left, values);
    }
    __device__ void store(i64 element, float value, u32) const { grad_[element] = value; }

    bool stochastic = false;

private:
    float* grad_;
    void* before_;
    Friction friction_;
    bool narrow_;
};

// What a lane holds of a tile.
struct Quads {
    float gradient[2][4], old[2][4], m[2][4], v[2][4];
};

// Steps a lane's two quads: `m` and `v` become the new moments, and targets are stored. `exchange`
// is the warp's part of the memory that dithers change hands in.
template <class TARGET>
__device__ __forceinline__ void step_quads(Quads& quads, const TARGET& target, const AdamStep& step,
                                           const Tile& tile, i64 numel, u32* exchange,
                                           u64* nonfinite) {
    u32 replaced = 0;
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const int left = tile.left(quad, numel);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Adam adam(quads.gradient[quad][j], quads.m[quad][j], quads.v[quad][j], step);
            const float old = quads.old[quad][j];
            quads.old[quad][j] = target.next(old, adam, step.numbers.keep);
            quads.gradient[quad][j] = adam.finite ? adam.scaled : old;
            quads.m[quad][j] = adam.exp_avg;
            quads.v[quad][j] = adam.exp_avg_sq;
            replaced += j < left && !adam.finite;
        }
    }
    u32 dithers[2][4] = {};
    if constexpr (TARGET::DITHERED)
        if (target.stochastic) dithers_of_quads(step.key, tile.number(), exchange, dithers);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        target.store(tile.element(quad), tile.left(quad, numel), quads.old[quad], dithers[quad]);
        target.remember(tile.element(quad), tile.left(quad, numel), quads.gradient[quad]);
    }
    add_to_counter(nonfinite, replaced);
}

// One block's part of a tensor with float32 moments.
template <class TARGET>
__device__ __forceinline__ void adamw_tile(const AdamTensor& tensor, const AdamShared& shared,
                                           const float* grad_scale, u64* nonfinite) {
    __shared__ __align__(16) u32 exchange[TARGET::DITHERED ? MAX_WARPS : 1][128];
    __shared__ AdamNumbers numbers;
    find_numbers(tensor, shared, numbers);
    const Tile tile(256, blockIdx.x - tensor.first_block);
    const TARGET target(tensor, shared);
    float* const exp_avg = static_cast<float*>(tensor.exp_avg);
    float* const exp_avg_sq = static_cast<float*>(tensor.exp_avg_sq);
    const i64 numel = tensor.numel;
    Quads quads;
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const i64 element = tile.element(quad);
        const int left = tile.left(quad, numel);
        target.load(element, left, quads.gradient[quad], quads.old[quad]);
        load_four(exp_avg + element, left, quads.m[quad]);
        load_four(exp_avg_sq + element, left, quads.v[quad]);
    }
    __syncthreads();
    const AdamStep step(numbers, tensor, shared, grad_scale);
    step_quads(quads, target, step, tile, numel, exchange[TARGET::DITHERED ? tile.warp() : 0],
               nonfinite);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const i64 element = tile.element(quad);
        const int left = tile.left(quad, numel);
        store_four(exp_avg + element, left, quads.m[quad]);
        store_four(exp_avg_sq + element, left, quads.v[quad]);
    }
}

// The maps of both moments; the barrier of `load` is the block's.
template <int BITS>
struct MomentMaps {
    __device__ void load() {
        decode_m.load(true);
        decode_v.load(false);
        encode_m.load(true);
        encode_v.load(false);
        __syncthreads();
    }

    typename Maps<BITS>::Decode decode_m, decode_v;
    typename Maps<BITS>::Encode encode_m, encode_v;
};

// One block's part of a tensor with moments of 8 or 4 bits in blocks of a plain size.
template <int BITS, class TARGET>
__device__ __forceinline__ void adamw_blockwise_tile(const AdamTensor& tensor,
                                                     const AdamShared& shared,
                                                     const float* grad_scale, u64* nonfinite,
                                                     i64 block_size, const AdamNumbers& numbers,
                                                     u32* exchange) {
    __shared__ MomentMaps<BITS> maps;
    const Tile tile(block_size, blockIdx.x - tensor.first_block);
    const TARGET target(tensor, shared);
    u8* const m_codes = static_cast<u8*>(tensor.exp_avg);
    u8* const v_codes = static_cast<u8*>(tensor.exp_avg_sq);
    const i64 numel = tensor.numel;
    Quads quads;
    u32 m_word[2], v_word[2];
    float m_scale[2], v_scale[2];
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const i64 element = tile.element(quad);
        const int left = tile.left(quad, numel);
        target.load(element, left, quads.gradient[quad], quads.old[quad]);
        m_word[quad] = load_codes<BITS>(m_codes, element, left);
        v_word[quad] = load_codes<BITS>(v_codes, element, left);
        m_scale[quad] = left > 0 ? tensor.exp_avg_scale[tile.group(quad)] : 0.0f;
        v_scale[quad] = left > 0 ? tensor.exp_avg_sq_scale[tile.group(quad)] : 0.0f;
    }
    maps.load(); // and with its barrier the numbers are there
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 m = code_of<BITS>(m_word[quad], j), v = code_of<BITS>(v_word[quad], j);
            // A code of nothing need not stand for zero.
            const bool here = j < tile.left(quad, numel);
            quads.m[quad][j] = here ? maps.decode_m.value(m) * m_scale[quad] : 0.0f;
            quads.v[quad][j] = here ? maps.decode_v.value(v) * v_scale[quad] : 0.0f;
        }
    }
    const AdamStep step(numbers, tensor, shared, grad_scale);
    step_quads(quads, target, step, tile, numel, exchange, nonfinite);
    u32 largest[2][2] = {};
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            largest[quad][0] = max(largest[quad][0], __float_as_uint(quads.m[quad][j]) & MAGNITUDE);
            largest[quad][1] = max(largest[quad][1], __float_as_uint(quads.v[quad][j]) & MAGNITUDE);
        }
    }
    tile.max_of_groups(largest);
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
        const i64 element = tile.element(quad);
        const int left = tile.left(quad, numel);
        const BlockScale m = BlockScale::of(__uint_as_float(largest[quad][0]));
        const BlockScale v = BlockScale::of(__uint_as_float(largest[quad][1]));
        if (tile.leads(quad) && left > 0) {
            tensor.exp_avg_scale[tile.group(quad)] = m.scale;
            tensor.exp_avg_sq_scale[tile.group(quad)] = v.scale;
        }
        u32 m_stored[4], v_stored[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            m_stored[j] = maps.encode_m.code(quads.m[quad][j] * m.inverse);
            v_stored[j] = maps.encode_v.code(quads.v[quad][j] * v.inverse);
        }
        store_codes<BITS>(m_codes, element, left, m_stored);
        store_codes<BITS>(v_codes, element, left, v_stored);
    }
}

// One block's part of a tensor with moments in blocks of any size, each of which has a team. The
// step is computed twice, first for the new scales, then to be stored: it need not be kept.
template <int BITS, class TARGET>
__device__ __forceinline__ void adamw_blockwise_run(const AdamTensor& tensor,
                                                    const AdamShared& shared,
                                                    const float* grad_scale, u64* nonfinite,
                                                    i64 block_size, int team_size,
                                                    const AdamNumbers& numbers) {
    __shared__ MomentMaps<BITS> maps;
    maps.load(); // and with its barrier the numbers are there
    const Team team(team_size, blockIdx.x - tensor.first_block);
    const TARGET target(tensor, shared);
    const AdamStep step(numbers, tensor, shared, grad_scale);
    u8* const m_codes = static_cast<u8*>(tensor.exp_avg);
    u8* const v_codes = static_cast<u8*>(tensor.exp_avg_sq);
    const i64 numel = tensor.numel, first = team.number() * block_size;
    const i64 end = min(first + block_size, numel);
    float m_scale = 0, v_scale = 0;
    if (first < numel) {
        m_scale = tensor.exp_avg_scale[team.number()];
        v_scale = tensor.exp_avg_sq_scale[team.number()];
    }
    const auto adam_at = [&](i64 element, float& old) {
        const float m = maps.decode_m.value(load_code(m_codes, element, BITS)) * m_scale;
        const float v = maps.decode_v.value(load_code(v_codes, element, BITS)) * v_scale;
        float gradient;
        target.load(element, gradient, old);
        return Adam(gradient, m, v, step);
    };
    u32 m_largest = 0, v_largest = 0, replaced = 0;
    for (i64 element = first + team.lane(); element < end; element += team.size()) {
        float old;
        const Adam adam = adam_at(element, old);
        m_largest = max(m_largest, __float_as_uint(adam.exp_avg) & MAGNITUDE);
        v_largest = max(v_largest, __float_as_uint(adam.exp_avg_sq) & MAGNITUDE);
        replaced += !adam.finite;
    }
    add_to_counter(nonfinite, replaced);
    const BlockScale m_block = BlockScale::of(__uint_as_float(team.max(m_largest)));
    const BlockScale v_block = BlockScale::of(__uint_as_float(team.max(v_largest)));
    if (team.lane() == 0 && first < numel) {
        tensor.exp_avg_scale[team.number()] = m_block.scale;
        tensor.exp_avg_sq_scale[team.number()] = v_block.scale;
    }
    Dithers dithers(step.key);
    for (i64 turn = 0; turn < block_size; turn += team.size()) {
        const i64 element = first + turn + team.lane();
        const bool here = element < end;
        u32 m_stored = 0, v_stored = 0;
        if (here) {
            float old;
            const Adam adam = adam_at(element, old);
            const u32 dither = TARGET::DITHERED && target.stochastic ? dithers.at(element) : 0;
            target.store(element, target.next(old, adam, step.numbers.keep), dither);
            target.remember(element, adam.finite ? adam.scaled : old);
            m_stored = maps.encode_m.code(adam.exp_avg * m_block.inverse);
            v_stored = maps.encode_v.code(adam.exp_avg_sq * v_block.inverse);
        }
        store_code(m_codes, element, here, m_stored, BITS);
        store_code(v_codes, element, here, v_stored, BITS);
    }
}
