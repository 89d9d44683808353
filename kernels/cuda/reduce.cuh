// Reductions over the threads of a block, in an order that only the number of threads decides. Every thread
// gets the result.
#pragma once

constexpr unsigned ALL_LANES = 0xffffffff;

template <class T, class Join>
__device__ __forceinline__ T warp_reduce(T value, Join join) {
    for (int offset = 16; offset > 0; offset /= 2)
        value = join(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

// `empty` joined with a value is the value. The number of threads must be a multiple of 32.
template <class T, class Join>
__device__ __forceinline__ T block_reduce(T value, T empty, Join join) {
    __shared__ T warps[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = blockDim.x / 32;
    value = warp_reduce(value, join);
    if (count == 1) return value;
    // The last reduction's results may still be read.
    __syncthreads();
    if (lane == 0) warps[warp] = value;
    __syncthreads();
    return warp_reduce(lane < count ? warps[lane] : empty, join);
}

__device__ __forceinline__ float block_sum(float value) {
    return block_reduce(value, 0.0f, [](float a, float b) { return a + b; });
}

__device__ __forceinline__ double block_sum(double value) {
    return block_reduce(value, 0.0, [](double a, double b) { return a + b; });
}

__device__ __forceinline__ float block_maximum(float value) {
    return block_reduce(value, -INFINITY, [](float a, float b) { return a > b ? a : b; });
}

// Whether it holds for any thread. In blocks of several warps, what threads wrote to shared memory before is
// there for all of them after.
__device__ __forceinline__ bool block_any(int holds) {
    return block_reduce(holds, 0, [](int a, int b) { return a | b; });
}
