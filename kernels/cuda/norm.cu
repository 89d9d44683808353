// Layer norm and RMS norm with the formulas of kernels/src/ops/norm.rs, and sums over rows for the gradients
// of weights and biases. A thread block takes row after row. Arithmetic is f32 whatever the elements are
// stored in.
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
    for_each_four(0, width, [&](unsigned at, unsigned count) {
        Four<float> x = widen_four(xs + at, count);
        for (int i = 0; i < 4; i++) sum += x.at[i];
    });
    float mean = block_sum(sum) / width;
    float squares = 0.0f;
    for_each_four(0, width, [&](unsigned at, unsigned count) {
        Four<float> x = widen_four(xs + at, count);
        for (int i = 0; i < 4; i++) {
            float centred = i < count ? x.at[i] - mean : 0.0f;
            squares += centred * centred;
        }
    });
    return Statistics{mean, 1.0f / sqrtf(block_sum(squares) / width + eps)};
}

template <class T>
__device__ __forceinline__ Statistics inverse_root_mean_square(const T *xs, unsigned width, float eps) {
    float squares = 0.0f;
    for_each_four(0, width, [&](unsigned at, unsigned count) {
        Four<float> x = widen_four(xs + at, count);
        for (int i = 0; i < 4; i++) squares += x.at[i] * x.at[i];
    });
    return Statistics{0.0f, 1.0f / sqrtf(block_sum(squares) / width + eps)};
}

template <class T>
__device__ __forceinline__ void layer_norm_forward(T *out, const T *xs, const T *weight, const T *bias,
                                                   unsigned long long rows, unsigned width, float eps) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x = xs + row * width;
        Statistics s = moments(x, width, eps);
        for_each_four(0, width, [&](unsigned at, unsigned count) {
            Four<float> y = widen_four(x + at, count);
            Four<float> w = widen_four(weight + at, count), b = widen_four(bias + at, count);
            for (int i = 0; i < 4; i++) y.at[i] = (y.at[i] - s.mean) * s.inverse * w.at[i] + b.at[i];
            narrow_four(out + row * width + at, y, count);
        });
    }
}

template <class T>
__device__ __forceinline__ void rms_norm_forward(T *out, const T *xs, const T *weight,
                                                 unsigned long long rows, unsigned width, float eps) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x = xs + row * width;
        Statistics s = inverse_root_mean_square(x, width, eps);
        for_each_four(0, width, [&](unsigned at, unsigned count) {
            Four<float> y = widen_four(x + at, count), w = widen_four(weight + at, count);
            for (int i = 0; i < 4; i++) y.at[i] = y.at[i] * s.inverse * w.at[i];
            narrow_four(out + row * width + at, y, count);
        });
    }
}

// The gradient of the input, and the statistics of its rows. With `centred` a layer norm, without an RMS
// norm.
template <class T, bool centred>
__device__ __forceinline__ void norm_backward(T *dx, Statistics *statistics, const T *xs, const T *dy,
                                              const T *weight, unsigned long long rows, unsigned width,
                                              float eps) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *x = xs + row * width, *g = dy + row * width;
        Statistics s = centred ? moments(x, width, eps) : inverse_root_mean_square(x, width, eps);
        if (threadIdx.x == 0) statistics[row] = s;
        // Elements beyond the row's end have a weighted gradient of zero.
        float sum_g = 0.0f, sum_g_x = 0.0f;
        for_each_four(0, width, [&](unsigned at, unsigned count) {
            Four<float> value = widen_four(x + at, count);
            Four<float> upstream = widen_four(g + at, count), w = widen_four(weight + at, count);
            for (int i = 0; i < 4; i++) {
                float weighted = upstream.at[i] * w.at[i];
                sum_g += weighted;
                sum_g_x += weighted * ((value.at[i] - s.mean) * s.inverse);
            }
        });
        float mean_g = centred ? block_sum(sum_g) / width : 0.0f;
        float mean_g_x = block_sum(sum_g_x) / width;
        for_each_four(0, width, [&](unsigned at, unsigned count) {
            Four<float> value = widen_four(x + at, count);
            Four<float> upstream = widen_four(g + at, count), w = widen_four(weight + at, count);
            for (int i = 0; i < 4; i++) {
                float normalised = (value.at[i] - s.mean) * s.inverse;
                value.at[i] = s.inverse * (upstream.at[i] * w.at[i] - mean_g - normalised * mean_g_x);
            }
            narrow_four(dx + row * width + at, value, count);
        });
    }
}

// Rows whose contributions are summed before they join the total, which keeps the rounding error of long sums
// small.
constexpr int GROUP_ROWS = 64;
constexpr int COLUMN_THREADS = 32;
constexpr int ROW_THREADS = 8;

// Sums of `dy`, and of `dy` times the normalised input where there are statistics, over one group of rows and
// 128 columns a thread block, four a thread: blockIdx.x counts columns, blockIdx.y groups. Results are
// [groups, width].
template <class T>
__device__ __forceinline__ void column_sums(float *sums, float *products, const T *dy, const T *xs,
                                            const Statistics *statistics, unsigned long long rows,
                                            unsigned width) {
    __shared__ Four<float> thread_sums[ROW_THREADS][COLUMN_THREADS];
    __shared__ Four<float> thread_products[ROW_THREADS][COLUMN_THREADS];
    unsigned column = 4 * (blockIdx.x * COLUMN_THREADS + threadIdx.x);
    unsigned count = column >= width ? 0 : width - column < 4 ? width - column : 4;
    unsigned long long groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
    for (unsigned long long group = blockIdx.y; group < groups; group += gridDim.y) {
        unsigned long long end = (group + 1) * GROUP_ROWS < rows ? (group + 1) * GROUP_ROWS : rows;
        Four<float> sum = {}, product = {};
        if (count > 0) {
            for (unsigned long long row = group * GROUP_ROWS + threadIdx.y; row < end; row += ROW_THREADS) {
                Four<float> g = widen_four(dy + row * width + column, count);
                for (int i = 0; i < 4; i++) sum.at[i] += g.at[i];
                if (statistics) {
                    Statistics s = statistics[row];
                    Four<float> x = widen_four(xs + row * width + column, count);
                    for (int i = 0; i < 4; i++) product.at[i] += g.at[i] * ((x.at[i] - s.mean) * s.inverse);
                }
            }
        }
        thread_sums[threadIdx.y][threadIdx.x] = sum;
        thread_products[threadIdx.y][threadIdx.x] = product;
        __syncthreads();
        if (threadIdx.y == 0 && count > 0) {
            for (int other = 1; other < ROW_THREADS; other++) {
                for (int i = 0; i < 4; i++) {
                    sum.at[i] += thread_sums[other][threadIdx.x].at[i];
                    product.at[i] += thread_products[other][threadIdx.x].at[i];
                }
            }
            if (sums) narrow_four(sums + group * width + column, sum, count);
            if (statistics) narrow_four(products + group * width + column, product, count);
        }
        __syncthreads();
    }
}

// Adds up the groups of [groups, width] in order.
template <class T>
__device__ __forceinline__ void column_totals(T *totals, const float *sums, unsigned long long groups,
                                              unsigned width) {
    for (unsigned long long column = first_index(); column < width; column += index_stride()) {
        float total = 0.0f;
        for (unsigned long long group = 0; group < groups; group++) total += sums[group * width + column];
        totals[column] = narrow<T>(total);
    }
}

// Every row of `out` becomes the bias.
template <class T>
__device__ __forceinline__ void repeat_row(T *out, const T *row, unsigned long long elements,
                                           unsigned width) {
    for (unsigned long long at = 4 * first_index(); at < elements; at += 4 * index_stride()) {
        unsigned column = (unsigned)(at - divide(at, width) * width);
        if (column + 4 <= width && four_aligned(row + column) && four_aligned(out + at)) {
            store_four(out + at, load_four(row + column));
        } else {
            for (unsigned i = 0; i < 4 && at + i < elements; i++) {
                out[at + i] = row[column];
                column = column + 1 == width ? 0 : column + 1;
            }
        }
    }
}

#define NORMS(SUFFIX, T)                                                                                     \
    extern "C" __global__ void layer_norm_forward_##SUFFIX(T *out, const T *xs, const T *weight,             \
                                                           const T *bias, unsigned long long rows,           \
                                                           unsigned width, float eps) {                      \
        layer_norm_forward(out, xs, weight, bias, rows, width, eps);                                         \
    }                                                                                                        \
    extern "C" __global__ void rms_norm_forward_##SUFFIX(                                                    \
        T *out, const T *xs, const T *weight, unsigned long long rows, unsigned width, float eps) {          \
        rms_norm_forward(out, xs, weight, rows, width, eps);                                                 \
    }                                                                                                        \
    extern "C" __global__ void layer_norm_backward_##SUFFIX(                                                 \
        T *dx, Statistics *statistics, const T *xs, const T *dy, const T *weight, unsigned long long rows,   \
        unsigned width, float eps) {                                                                         \
        norm_backward<T, true>(dx, statistics, xs, dy, weight, rows, width, eps);                            \
    }                                                                                                        \
    extern "C" __global__ void rms_norm_backward_##SUFFIX(                                                   \
        T *dx, Statistics *statistics, const T *xs, const T *dy, const T *weight, unsigned long long rows,   \
        unsigned width, float eps) {                                                                         \
        norm_backward<T, false>(dx, statistics, xs, dy, weight, rows, width, eps);                           \
    }                                                                                                        \
    extern "C" __global__ void column_sums_##SUFFIX(float *sums, float *products, const T *dy, const T *xs,  \
                                                    const Statistics *statistics, unsigned long long rows,   \
                                                    unsigned width) {                                        \
        column_sums(sums, products, dy, xs, statistics, rows, width);                                        \
    }                                                                                                        \
    extern "C" __global__ void column_totals_##SUFFIX(T *totals, const float *sums,                          \
                                                      unsigned long long groups, unsigned width) {           \
        column_totals(totals, sums, groups, width);                                                          \
    }                                                                                                        \
    extern "C" __global__ void repeat_row_##SUFFIX(T *out, const T *row, unsigned long long elements,        \
                                                   unsigned width) {                                         \
        repeat_row(out, row, elements, width);                                                               \
    }

NORMS(f32, float)
NORMS(bf16, Bf16)
NORMS(f16, F16)
