// Lists of tensors in one launch: a structure by value in the kernel's parameters, of which a
// block takes the tensor that its number falls to.
#pragma once

#include "element.cuh"
#include "flag.cuh"

#ifndef LIST_CAPACITY
#define LIST_CAPACITY 400
#endif

template <class TENSOR>
struct List {
    TENSOR tensors[LIST_CAPACITY];
};

// The last tensor that begins at this block or before: those without elements have no blocks and
// the same beginning as the next one.
template <class TENSOR>
__device__ __forceinline__ int tensor_of_block(const List<TENSOR>& list, int count) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (list.tensors[middle].first_block <= blockIdx.x) low = middle;
        else high = middle;
    }
    return low;
}
