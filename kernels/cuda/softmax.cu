// Softmax over rows, plain and causal, with the formulas of kernels/src/ops/softmax.rs. A thread block takes row after row.
#include "element.cuh"
#include "reduce.cuh"

// The columns that a row sees: of the `query_rows` rows of a matrix the last sees up to the last column, each before it one less
// far; at most `window` columns, which is at most `columns`.
struct Visible {
    unsigned first, end;

    __device__ __forceinline__ Visible(unsigned long long row, unsigned columns, unsigned query_rows, unsigned window) {
        end = (unsigned)(row % query_rows) + columns - query_rows + 1;
        first = end > window ? end - window : 0;
    }

    __device__ __forceinline__ bool has(unsigned at) const { return at >= first && at < end; }
};

// `out` may be `scores`.
template <class T>
__device__ __forceinline__ void softmax_forward(T *out, const T *scores, unsigned long long rows, unsigned columns,
                                                unsigned query_rows, unsigned window, float scale) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *score = scores + row * columns;
        T *probability = out + row * columns;
        Visible seen(row, columns, query_rows, window);
        unsigned first = seen.first + threadIdx.x;
        float largest = -INFINITY;
        for (unsigned at = first; at < seen.end; at += blockDim.x) {
            float scaled = scale * widen(score[at]);
            largest = scaled > largest ? scaled : largest;
        }
        largest = block_maximum(largest);
        float sum = 0.0f;
        for (unsigned at = first; at < seen.end; at += blockDim.x) sum += expf(scale * widen(score[at]) - largest);
        float inverse = 1.0f / block_sum(sum);
        for (unsigned at = threadIdx.x; at < columns; at += blockDim.x) {
            float result = seen.has(at) ? expf(scale * widen(score[at]) - largest) * inverse : 0.0f;
            probability[at] = narrow<T>(result);
        }
    }
}

// `dx` may be `dy`.
template <class T>
__device__ __forceinline__ void softmax_backward(T *dx, const T *dy, const T *probabilities, unsigned long long rows,
                                                 unsigned columns, unsigned query_rows, unsigned window, float scale) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *g = dy + row * columns, *probability = probabilities + row * columns;
        Visible seen(row, columns, query_rows, window);
        float dot = 0.0f;
        for (unsigned at = seen.first + threadIdx.x; at < seen.end; at += blockDim.x)
            dot += widen(g[at]) * widen(probability[at]);
        dot = block_sum(dot);
        for (unsigned at = threadIdx.x; at < columns; at += blockDim.x) {
            float result = seen.has(at) ? scale * widen(probability[at]) * (widen(g[at]) - dot) : 0.0f;
            dx[row * columns + at] = narrow<T>(result);
        }
    }
}

#define SOFTMAX(SUFFIX, T)                                                                                             \
    extern "C" __global__ void softmax_forward_##SUFFIX(T *out, const T *scores, unsigned long long rows,              \
                                                        unsigned columns, unsigned query_rows, unsigned window,        \
                                                        float scale) {                                                 \
        softmax_forward(out, scores, rows, columns, query_rows, window, scale);                                        \
    }                                                                                                                  \
    extern "C" __global__ void softmax_backward_##SUFFIX(T *dx, const T *dy, const T *probabilities,                   \
                                                         unsigned long long rows, unsigned columns,                    \
                                                         unsigned query_rows, unsigned window, float scale) {          \
        softmax_backward(dx, dy, probabilities, rows, columns, query_rows, window, scale);                             \
    }

SOFTMAX(f32, float)
SOFTMAX(bf16, Bf16)
SOFTMAX(f16, F16)
