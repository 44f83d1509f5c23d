// Fused AdamW steps over lists of parameters, one launch for a list.
#include "adamw.cuh"

using Target = Parameters<PARAM, GRAD>;

// Steps with float32 moments. Block: 256 threads, 2048 elements of one tensor.
extern "C" __global__ void __launch_bounds__(256, 3)
adamw_step(const __grid_constant__ AdamList list, int count, AdamShared shared,
           const float* grad_scale, const float* found_inf, u64* nonfinite) {
    if (is_set(found_inf)) return;
    const AdamTensor& tensor = list.tensors[tensor_of_block(list, count)];
    adamw_tile<Target>(tensor, shared, grad_scale, nonfinite);
}

// Steps with moments of 8 or 4 bits in blocks of a plain size. Block: 32 threads for each 256
// elements of one tensor, up to 256 (tile.cuh).
extern "C" __global__ void __launch_bounds__(256, 2)
adamw_blockwise_step(const __grid_constant__ AdamList list, int count, AdamShared shared,
                     const float* grad_scale, const float* found_inf, u64* nonfinite,
                     i64 block_size, int bits) {
    __shared__ __align__(16) u32 exchange[Target::DITHERED ? MAX_WARPS : 1][128];
    if (is_set(found_inf)) return;
    const AdamTensor& tensor = list.tensors[tensor_of_block(list, count)];
    u32* const mine = exchange[Target::DITHERED ? threadIdx.x / 32 : 0];
    __shared__ AdamNumbers numbers;
    find_numbers(tensor, shared, numbers);
    if (bits == 8)
        adamw_blockwise_tile<8, Target>(tensor, shared, grad_scale, nonfinite, block_size, numbers,
                                        mine);
    else
        adamw_blockwise_tile<4, Target>(tensor, shared, grad_scale, nonfinite, block_size, numbers,
                                        mine);
}

// The same for blocks of any size. Block: 256 threads in teams, each of which has a block of
// moments.
extern "C" __global__ void __launch_bounds__(256, 3)
adamw_blockwise_step_any(const __grid_constant__ AdamList list, int count, AdamShared shared,
                         const float* grad_scale, const float* found_inf, u64* nonfinite,
                         i64 block_size, int bits, int team) {
    if (is_set(found_inf)) return;
    const AdamTensor& tensor = list.tensors[tensor_of_block(list, count)];
    __shared__ AdamNumbers numbers;
    find_numbers(tensor, shared, numbers);
    if (bits == 8)
        adamw_blockwise_run<8, Target>(tensor, shared, grad_scale, nonfinite, block_size, team,
                                       numbers);
    else
        adamw_blockwise_run<4, Target>(tensor, shared, grad_scale, nonfinite, block_size, team,
                                       numbers);
}
