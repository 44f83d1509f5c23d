// AdamW's update without decay in place of float32 gradients, over lists, one launch for a list.
#include "adamw.cuh"

// With float32 moments. Block: 256 threads, 2048 elements of one tensor.
extern "C" __global__ void __launch_bounds__(256, 3)
adamw_direction(const __grid_constant__ AdamList list, int count, AdamShared shared,
                const float* grad_scale, const float* found_inf, u64* nonfinite) {
    if (is_set(found_inf)) return;
    const AdamTensor& tensor = list.tensors[tensor_of_block(list, count)];
    adamw_tile<Directions>(tensor, shared, grad_scale, nonfinite);
}

// With moments of 8 or 4 bits in blocks of a plain size. Block: 32 threads for each 256 elements
// of one tensor, up to 256 (tile.cuh).
extern "C" __global__ void __launch_bounds__(256, 3)
adamw_blockwise_direction(const __grid_constant__ AdamList list, int count, AdamShared shared,
                          const float* grad_scale, const float* found_inf, u64* nonfinite,
                          i64 block_size, int bits) {
    if (is_set(found_inf)) return;
    const AdamTensor& tensor = list.tensors[tensor_of_block(list, count)];
    __shared__ AdamNumbers numbers;
    find_numbers(tensor, shared, numbers);
    if (bits == 8)
        adamw_blockwise_tile<8, Directions>(tensor, shared, grad_scale, nonfinite, block_size,
                                            numbers, nullptr);
    else
        adamw_blockwise_tile<4, Directions>(tensor, shared, grad_scale, nonfinite, block_size,
                                            numbers, nullptr);
}

// The same for blocks of any size. Block: 256 threads in teams, each of which has a block of
// moments.
extern "C" __global__ void __launch_bounds__(256, 3)
adamw_blockwise_direction_any(const __grid_constant__ AdamList list, int count, AdamShared shared,
                              const float* grad_scale, const float* found_inf, u64* nonfinite,
                              i64 block_size, int bits, int team) {
    if (is_set(found_inf)) return;
    const AdamTensor& tensor = list.tensors[tensor_of_block(list, count)];
    __shared__ AdamNumbers numbers;
    find_numbers(tensor, shared, numbers);
    if (bits == 8)
        adamw_blockwise_run<8, Directions>(tensor, shared, grad_scale, nonfinite, block_size,
                                           team, numbers);
    else
        adamw_blockwise_run<4, Directions>(tensor, shared, grad_scale, nonfinite, block_size,
                                           team, numbers);
}
