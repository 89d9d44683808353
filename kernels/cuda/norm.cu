// Layer norm and RMS norm with the formulas of kernels/src/ops/norm.rs, and sums over rows for the gradients of weights and
// biases. A thread block takes row after row. Arithmetic is f32 whatever the elements are stored in.
#include "element.cuh"
#include "reduce.cuh"

// What the backward of a row needs of its elements.
struct Statistics {
    float mean;
    float inverse;
};

template <class T>
__device__ __forceinline__ Statistics moments(const T *xs, unsigned width, float eps) {
    float sum = 0.0f;
    for (unsigned at = threadIdx.x; at < width; at += blockDim.x) sum += widen(xs[at]);
    float mean = block_sum(sum) / width;
    float squares = 0.0f;
    for (unsigned at = threadIdx.x; at < width; at += blockDim.x) {
        float centred = widen(xs[at]) - mean;
        squares += centred * centred;
    }
    return Statistics{mean, 1.0f / sqrtf(block_sum(squares) / width + eps)};
}

template <class T>
__device__ __forceinline__ Statistics inverse_root_mean_square(const T *xs, unsigned width, float eps) {
    float squares = 0.0f;
    for (unsigned at = threadIdx.x; at < width; at += blockDim.x) squares += widen(xs[at]) * widen(xs[at]);
    return Statistics{0.0f, 1.0f / sqrtf(block_sum(squares) / width + eps)};
}

template <class T>
__device__ __forceinline__ void layer_norm_forward(T *out, const T *xs, const T *weight, const T *bias,
                                                   unsigned long long rows, unsigned width, float eps) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x = xs + row * width;
        Statistics s = moments(x, width, eps);
        for (unsigned at = threadIdx.x; at < width; at += blockDim.x) {
            float normalised = (widen(x[at]) - s.mean) * s.inverse;
            out[row * width + at] = narrow<T>(normalised * widen(weight[at]) + widen(bias[at]));
        }
    }
}

template <class T>
__device__ __forceinline__ void rms_norm_forward(T *out, const T *xs, const T *weight, unsigned long long rows,
                                                 unsigned width, float eps) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x = xs + row * width;
        Statistics s = inverse_root_mean_square(x, width, eps);
        for (unsigned at = threadIdx.x; at < width; at += blockDim.x) {
            out[row * width + at] = narrow<T>(widen(x[at]) * s.inverse * widen(weight[at]));
        }
    }
}

// The gradient of the input, and the statistics of its rows. With `centred` a layer norm, without an RMS norm.
template <class T, bool centred>
__device__ __forceinline__ void norm_backward(T *dx, Statistics *statistics, const T *xs, const T *dy, const T *weight,
                                              unsigned long long rows, unsigned width, float eps) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x = xs + row * width, *g = dy + row * width;
        Statistics s = centred ? moments(x, width, eps) : inverse_root_mean_square(x, width, eps);
        if (threadIdx.x == 0) statistics[row] = s;
        float sum_g = 0.0f, sum_g_x = 0.0f;
        for (unsigned at = threadIdx.x; at < width; at += blockDim.x) {
            float weighted = widen(g[at]) * widen(weight[at]);
            sum_g += weighted;
            sum_g_x += weighted * ((widen(x[at]) - s.mean) * s.inverse);
        }
        float mean_g = centred ? block_sum(sum_g) / width : 0.0f;
        float mean_g_x = block_sum(sum_g_x) / width;
        for (unsigned at = threadIdx.x; at < width; at += blockDim.x) {
            float weighted = widen(g[at]) * widen(weight[at]);
            float normalised = (widen(x[at]) - s.mean) * s.inverse;
            dx[row * width + at] = narrow<T>(s.inverse * (weighted - mean_g - normalised * mean_g_x));
        }
    }
}

// Rows whose contributions are summed before they join the total, which keeps the rounding error of long sums small.
constexpr int GROUP_ROWS = 64;
constexpr int COLUMNS = 32;
constexpr int ROW_THREADS = 8;

// Sums of `dy`, and of `dy` times the normalised input where there are statistics, over one group of rows and 32 columns a
// thread block: blockIdx.x counts columns, blockIdx.y groups. Results are [groups, width].
template <class T>
__device__ __forceinline__ void column_sums(float *sums, float *products, const T *dy, const T *xs,
                                            const Statistics *statistics, unsigned long long rows, unsigned width) {
    __shared__ float thread_sums[ROW_THREADS][COLUMNS];
    __shared__ float thread_products[ROW_THREADS][COLUMNS];
    unsigned column = blockIdx.x * COLUMNS + threadIdx.x;
    unsigned long long groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
    for (unsigned long long group = blockIdx.y; group < groups; group += gridDim.y) {
        unsigned long long end = (group + 1) * GROUP_ROWS < rows ? (group + 1) * GROUP_ROWS : rows;
        float sum = 0.0f, product = 0.0f;
        if (column < width) {
            for (unsigned long long row = group * GROUP_ROWS + threadIdx.y; row < end; row += ROW_THREADS) {
                float g = widen(dy[row * width + column]);
                sum += g;
                if (statistics) {
                    Statistics s = statistics[row];
                    product += g * ((widen(xs[row * width + column]) - s.mean) * s.inverse);
                }
            }
        }
        thread_sums[threadIdx.y][threadIdx.x] = sum;
        thread_products[threadIdx.y][threadIdx.x] = product;
        __syncthreads();
        if (threadIdx.y == 0 && column < width) {
            for (int other = 1; other < ROW_THREADS; other++) {
                sum += thread_sums[other][threadIdx.x];
                product += thread_products[other][threadIdx.x];
            }
            if (sums) sums[group * width + column] = sum;
            if (statistics) products[group * width + column] = product;
        }
        __syncthreads();
    }
}

// Adds up the groups of [groups, width] in order.
template <class T>
__device__ __forceinline__ void column_totals(T *totals, const float *sums, unsigned long long groups, unsigned width) {
    for (unsigned long long column = first_index(); column < width; column += index_stride()) {
        float total = 0.0f;
        for (unsigned long long group = 0; group < groups; group++) total += sums[group * width + column];
        totals[column] = narrow<T>(total);
    }
}

// Every row of `out` becomes the bias.
template <class T>
__device__ __forceinline__ void repeat_row(T *out, const T *row, unsigned long long elements, unsigned width) {
    for (unsigned long long at = first_index(); at < elements; at += index_stride()) {
        out[at] = row[at - divide(at, width) * width];
    }
}

#define NORMS(SUFFIX, T)                                                                                               \
    extern "C" __global__ void layer_norm_forward_##SUFFIX(T *out, const T *xs, const T *weight, const T *bias,        \
                                                           unsigned long long rows, unsigned width, float eps) {       \
        layer_norm_forward(out, xs, weight, bias, rows, width, eps);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_forward_##SUFFIX(T *out, const T *xs, const T *weight,                         \
                                                         unsigned long long rows, unsigned width, float eps) {         \
        rms_norm_forward(out, xs, weight, rows, width, eps);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_backward_##SUFFIX(T *dx, Statistics *statistics, const T *xs, const T *dy,   \
                                                            const T *weight, unsigned long long rows, unsigned width,  \
                                                            float eps) {                                               \
        norm_backward<T, true>(dx, statistics, xs, dy, weight, rows, width, eps);                                      \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_backward_##SUFFIX(T *dx, Statistics *statistics, const T *xs, const T *dy,     \
                                                          const T *weight, unsigned long long rows, unsigned width,    \
                                                          float eps) {                                                 \
        norm_backward<T, false>(dx, statistics, xs, dy, weight, rows, width, eps);                                     \
    }                                                                                                                  \
    extern "C" __global__ void column_sums_##SUFFIX(float *sums, float *products, const T *dy, const T *xs,            \
                                                    const Statistics *statistics, unsigned long long rows,             \
                                                    unsigned width) {                                                  \
        column_sums(sums, products, dy, xs, statistics, rows, width);                                                  \
    }                                                                                                                  \
    extern "C" __global__ void column_totals_##SUFFIX(T *totals, const float *sums, unsigned long long groups,         \
                                                      unsigned width) {                                                \
        column_totals(totals, sums, groups, width);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void repeat_row_##SUFFIX(T *out, const T *row, unsigned long long elements,                  \
                                                   unsigned width) {                                                   \
        repeat_row(out, row, elements, width);                                                                         \
    }

NORMS(f32, float)
NORMS(bf16, Bf16)
NORMS(f16, F16)
