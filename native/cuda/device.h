// What the kernels share: launches without nvcc's syntax, so that the same source is compiled for a CPU (tests/native/cuda_shim.h),
// and reductions over a block.
#pragma once

#include "cuda/kernels.h"

#ifndef ASRKF_CUDA_SHIM
#    include <cuda_fp16.h>
#    include <cuda_runtime.h>
#endif

namespace asrkf::cuda {

constexpr uint32_t WARP = 32;

template <typename... Wanted, typename... Given>
failure launch(void (*kernel)(Wanted...), dim3 grid, uint32_t n_threads, cudaStream_t stream, Given... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim  = grid;
    config.blockDim = dim3(n_threads, 1, 1);
    config.stream   = stream;
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (status == cudaSuccess) {
        return nullptr;
    }
    cudaGetLastError(); // it is told here: nobody else shall find it
    return cudaGetErrorString(status);
}

// Whether the program holds no code of this kernel for the current device.
template <typename... Wanted> failure is_missing(void (*kernel)(Wanted...)) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    if (status == cudaSuccess) {
        return nullptr;
    }
    cudaGetLastError();
    return cudaGetErrorString(status);
}

// The larger one; NaN if either is: a maximum that loses a NaN would hide it.
template <typename T> __device__ __forceinline__ T larger(T a, T b) { return b > a || b != b ? b : a; }

// One value of all threads: join must be associative. Every thread gets it. shared: one T for each warp; free again after the
// next barrier.
template <uint32_t n_threads, typename T, typename Join> __device__ __forceinline__ T reduce(T value, T * shared, Join join) {
    static_assert(n_threads % WARP == 0 && n_threads <= WARP*WARP, "whole warps, and one that joins them");
    for (uint32_t distance = WARP/2; distance > 0; distance /= 2) {
        value = join(value, value.shuffled(distance));
    }
    if (threadIdx.x % WARP == 0) {
        shared[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = shared[0];
    for (uint32_t warp = 1; warp < n_threads / WARP; ++warp) {
        value = join(value, shared[warp]);
    }
    return value;
}

} // namespace asrkf::cuda
