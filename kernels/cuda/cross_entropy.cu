// The loss of next-token prediction over tiles of logits, with the formulas of
// kernels/src/ops/cross_entropy.rs.
#include "element.cuh"
#include "reduce.cuh"

// Adds a tile of logits, `columns` entries of the vocabulary from `first_column` on, to what is known of its
// rows: largest logit, sum of exponentials relative to it, logit of the target. The first tile finds nothing
// there. A thread block takes row after row.
template <class T>
__device__ __forceinline__ void add_tile(float *maxima, float *sums, float *target_logits, const T *logits,
                                         const unsigned *targets, unsigned rows, unsigned columns,
                                         unsigned first_column) {
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *logit = logits + (unsigned long long)row * columns;
        float largest = -INFINITY;
        for_each_four(0, columns, [&](unsigned at, unsigned count) {
            Four<float> values = widen_four(logit + at, count);
            for (int i = 0; i < 4; i++) {
                float value = i < count ? values.at[i] : -INFINITY;
                largest = value > largest ? value : largest;
            }
        });
        float before = first_column == 0 ? -INFINITY : maxima[row];
        largest = block_maximum(largest);
        largest = before > largest ? before : largest;
        float sum = 0.0f;
        for_each_four(0, columns, [&](unsigned at, unsigned count) {
            Four<float> values = widen_four(logit + at, count);
            for (int i = 0; i < 4; i++) sum += i < count ? expf(values.at[i] - largest) : 0.0f;
        });
        sum = block_sum(sum);
        // Every thread has read what was known: the reductions have waited for all of them.
        if (threadIdx.x == 0) {
            if (first_column > 0) sum += sums[row] * expf(before - largest);
            maxima[row] = largest;
            sums[row] = sum;
            unsigned column = targets[row] - first_column;
            if (targets[row] >= first_column && column < columns) target_logits[row] = widen(logit[column]);
        }
    }
}

// The mean loss, then each row's logarithm of its sum. One thread block.
extern "C" __global__ void loss_and_log_sums(float *out, const float *maxima, const float *sums,
                                             const float *target_logits, unsigned rows) {
    double total = 0.0;
    for (unsigned row = threadIdx.x; row < rows; row += blockDim.x) {
        out[1 + row] = maxima[row] + logf(sums[row]);
        total += (double)maxima[row] - (double)target_logits[row] + log((double)sums[row]);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) out[0] = (float)(total / rows);
}

// The gradient of a tile of logits; `gradients` may be `logits`. `upstream` is the gradient of the mean loss.
template <class T>
__device__ __forceinline__ void tile_gradient(T *gradients, const T *logits, const float *log_sums,
                                              const unsigned *targets, const float *upstream, unsigned rows,
                                              unsigned columns, unsigned first_column) {
    float scale = upstream[0] / rows;
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        unsigned long long start = (unsigned long long)row * columns;
        float log_sum = log_sums[row];
        unsigned column = targets[row] - first_column;
        bool here = targets[row] >= first_column;
        for_each_four(0, columns, [&](unsigned at, unsigned count) {
            Four<float> values = widen_four(logits + start + at, count);
            for (int i = 0; i < 4; i++) {
                float gradient = scale * expf(values.at[i] - log_sum);
                values.at[i] = here && at + i == column ? gradient - scale : gradient;
            }
            narrow_four(gradients + start + at, values, count);
        });
    }
}

// How many of up to four neighbours from `at` on there are.
__device__ __forceinline__ unsigned up_to_four(unsigned long long at, unsigned long long elements) {
    return elements - at < 4 ? (unsigned)(elements - at) : 4;
}

// Adds a partial product to a sum in f32, or makes it the sum.
template <class T>
__device__ __forceinline__ void add_widened(float *sum, const T *part, unsigned long long elements,
                                            int first) {
    for (unsigned long long at = 4 * first_index(); at < elements; at += 4 * index_stride()) {
        unsigned count = up_to_four(at, elements);
        Four<float> values = widen_four(part + at, count);
        if (!first) {
            Four<float> before = widen_four(sum + at, count);
            for (int i = 0; i < 4; i++) values.at[i] = before.at[i] + values.at[i];
        }
        narrow_four(sum + at, values, count);
    }
}

template <class T>
__device__ __forceinline__ void narrow_all(T *out, const float *values, unsigned long long elements) {
    for (unsigned long long at = 4 * first_index(); at < elements; at += 4 * index_stride()) {
        unsigned count = up_to_four(at, elements);
        narrow_four(out + at, widen_four(values + at, count), count);
    }
}

#define CROSS_ENTROPY(SUFFIX, T)                                                                             \
    extern "C" __global__ void add_tile_##SUFFIX(float *maxima, float *sums, float *target_logits,           \
                                                 const T *logits, const unsigned *targets, unsigned rows,    \
                                                 unsigned columns, unsigned first_column) {                  \
        add_tile(maxima, sums, target_logits, logits, targets, rows, columns, first_column);                 \
    }                                                                                                        \
    extern "C" __global__ void tile_gradient_##SUFFIX(                                                       \
        T *gradients, const T *logits, const float *log_sums, const unsigned *targets,                       \
        const float *upstream, unsigned rows, unsigned columns, unsigned first_column) {                     \
        tile_gradient(gradients, logits, log_sums, targets, upstream, rows, columns, first_column);          \
    }                                                                                                        \
    extern "C" __global__ void add_widened_##SUFFIX(float *sum, const T *part, unsigned long long elements,  \
                                                    int first) {                                             \
        add_widened(sum, part, elements, first);                                                             \
    }                                                                                                        \
    extern "C" __global__ void narrow_all_##SUFFIX(T *out, const float *values,                              \
                                                   unsigned long long elements) {                            \
        narrow_all(out, values, elements);                                                                   \
    }

CROSS_ENTROPY(f32, float)
CROSS_ENTROPY(bf16, Bf16)
CROSS_ENTROPY(f16, F16)
