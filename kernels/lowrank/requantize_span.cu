// Whole groups of any size of a quantized weight, from a dense update of just their elements: the
// second of two passes, after project_back.
#include "run.cuh"

// Elements `first` to `first + count` of the weight, whole groups but for the tensor's end; values
// has their updates. Block: 256 threads in teams, each of which has a run.
extern "C" __global__ void __launch_bounds__(256)
    requantize_span(u8* __restrict__ codes, float* __restrict__ scale, u8* __restrict__ zero_point,
                    const float* __restrict__ values, i64 first, i64 count, const float* found_inf,
                    i64 group_size, int bits, float keep, float alpha, int stochastic, Key key,
                    int team) {
    if (is_set(found_inf)) return;
    const Weight weight{codes, scale, zero_point, group_size, bits};
    const Team mine(team, blockIdx.x);
    const i64 run = weight.run();
    const i64 begin = first + mine.number() * run, end = min(begin + run, first + count);
    requantize_run(weight, {keep, alpha}, {key, stochastic}, values - first, begin, end, run, mine);
}
