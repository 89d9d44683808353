// Softmax over rows, plain and causal, with the formulas of kernels/src/ops/softmax.rs. A thread block takes
// row after row.
#include "element.cuh"
#include "reduce.cuh"

// The columns that a row sees: of the `query_rows` rows of a matrix the last sees up to the last column, each
// before it one less far; at most `window` columns, which is at most `columns`.
struct Visible {
    unsigned first, end;

    __device__ __forceinline__ Visible(unsigned long long row, unsigned columns, unsigned query_rows,
                                       unsigned window) {
        end = (unsigned)(row % query_rows) + columns - query_rows + 1;
        first = end > window ? end - window : 0;
    }

    __device__ __forceinline__ bool has(unsigned at) const { return at >= first && at < end; }

    // The four neighbours, counted from the row's start, that the first column is one of.
    __device__ __forceinline__ unsigned first_four() const { return first - first % 4; }
};

// `out` may be `scores`.
template <class T>
__device__ __forceinline__ void softmax_forward(T *out, const T *scores, unsigned long long rows,
                                                unsigned columns, unsigned query_rows, unsigned window,
                                                float scale) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *score = scores + row * columns;
        T *probability = out + row * columns;
        Visible seen(row, columns, query_rows, window);
        float largest = -INFINITY;
        for_each_four(seen.first_four(), seen.end, [&](unsigned at, unsigned count) {
            Four<float> s = widen_four(score + at, count);
            for (int i = 0; i < 4; i++) {
                float scaled = seen.has(at + i) ? scale * s.at[i] : -INFINITY;
                largest = scaled > largest ? scaled : largest;
            }
        });
        largest = block_maximum(largest);
        float sum = 0.0f;
        for_each_four(seen.first_four(), seen.end, [&](unsigned at, unsigned count) {
            Four<float> s = widen_four(score + at, count);
            for (int i = 0; i < 4; i++) sum += seen.has(at + i) ? expf(scale * s.at[i] - largest) : 0.0f;
        });
        float inverse = 1.0f / block_sum(sum);
        for_each_four(0, columns, [&](unsigned at, unsigned count) {
            Four<float> s = widen_four(score + at, count);
            for (int i = 0; i < 4; i++) {
                s.at[i] = seen.has(at + i) ? expf(scale * s.at[i] - largest) * inverse : 0.0f;
            }
            narrow_four(probability + at, s, count);
        });
    }
}

// `dx` may be `dy`.
template <class T>
__device__ __forceinline__ void softmax_backward(T *dx, const T *dy, const T *probabilities,
                                                 unsigned long long rows, unsigned columns,
                                                 unsigned query_rows, unsigned window, float scale) {
    for (unsigned long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *upstream = dy + row * columns, *probability = probabilities + row * columns;
        Visible seen(row, columns, query_rows, window);
        float dot = 0.0f;
        for_each_four(seen.first_four(), seen.end, [&](unsigned at, unsigned count) {
            Four<float> g = widen_four(upstream + at, count), p = widen_four(probability + at, count);
            for (int i = 0; i < 4; i++) dot += seen.has(at + i) ? g.at[i] * p.at[i] : 0.0f;
        });
        dot = block_sum(dot);
        for_each_four(0, columns, [&](unsigned at, unsigned count) {
            Four<float> g = widen_four(upstream + at, count), p = widen_four(probability + at, count);
            for (int i = 0; i < 4; i++) g.at[i] = seen.has(at + i) ? scale * p.at[i] * (g.at[i] - dot) : 0.0f;
            narrow_four(dx + row * columns + at, g, count);
        });
    }
}

#define SOFTMAX(SUFFIX, T)                                                                                   \
    extern "C" __global__ void softmax_forward_##SUFFIX(T *out, const T *scores, unsigned long long rows,    \
                                                        unsigned columns, unsigned query_rows,               \
                                                        unsigned window, float scale) {                      \
        softmax_forward(out, scores, rows, columns, query_rows, window, scale);                              \
    }                                                                                                        \
    extern "C" __global__ void softmax_backward_##SUFFIX(                                                    \
        T *dx, const T *dy, const T *probabilities, unsigned long long rows, unsigned columns,               \
        unsigned query_rows, unsigned window, float scale) {                                                 \
        softmax_backward(dx, dy, probabilities, rows, columns, query_rows, window, scale);                   \
    }

SOFTMAX(f32, float)
SOFTMAX(bf16, Bf16)
SOFTMAX(f16, F16)
