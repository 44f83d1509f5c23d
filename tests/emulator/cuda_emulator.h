// CUDA C++ for a host compiler: included before a .cu file (by build.py), it lets g++ compile the
// file as it stands, to be run by runtime/scheduler.cpp. See README.md for what is modelled.
#pragma once

#ifndef GRADPRESS_EMULATOR
#define GRADPRESS_EMULATOR 1
#endif

// Everything a kernel's own includes could pull in comes before the keywords below are redefined.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "runtime/interface.h"

// Keywords.
#define __device__
#define __host__
#define __global__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...) // build.py reads it and passes it on
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

// `used`: a variable that the file never writes must still be read, not taken for zero.
#define __shared__ static __attribute__((section("cushared"), used))

// On CUDA: extern __shared__ (fixtures/portable.cuh).
#define DYNAMIC_SHARED(type, name) \
    type* const name = reinterpret_cast<type*>(::cuemu::dynamic_shared)

constexpr int warpSize = 32;

#include "device/collectives.h"
#include "device/memory.h"
#include "device/numbers.h"
#include "device/half.h"
#include "device/vectors.h"

#undef assert
#define assert(condition) \
    ((condition) ? void() \
                 : ::cuemu::fail("assertion failed: %s (%s:%d)", #condition, \
                                 ::cuemu::file_name(__FILE__), __LINE__))
inline void __trap() { ::cuemu::fail("__trap"); }

#include "device/entry.h"
