// Rotary position embedding with the formulas of kernels/src/ops/rope.rs. A thread takes pair after pair.
#include "element.cuh"

// `xs` is [B, heads, positions, 2·pairs]; a sequence's rows of `cos` and `sin`, `pairs` wide, start `table_rows` after those of
// the one before. `direction` is 1 forward and −1 backward.
template <class T>
__device__ __forceinline__ void rope(T *out, const T *xs, const T *cos, const T *sin, unsigned long long pair_count,
                                     unsigned heads, unsigned positions, unsigned pairs, unsigned table_rows,
                                     float direction, int interleaved) {
    for (unsigned long long at = first_index(); at < pair_count; at += index_stride()) {
        unsigned long long row = at / pairs;
        unsigned pair = (unsigned)(at % pairs);
        unsigned long long sequence = row / ((unsigned long long)heads * positions);
        unsigned long long angle = (sequence * table_rows + row % positions) * pairs + pair;
        float c = widen(cos[angle]), s = direction * widen(sin[angle]);
        unsigned long long first = row * 2 * pairs + (interleaved ? 2 * pair : pair);
        unsigned long long second = first + (interleaved ? 1 : pairs);
        float a = widen(xs[first]), b = widen(xs[second]);
        out[first] = narrow<T>(a * c - b * s);
        out[second] = narrow<T>(a * s + b * c);
    }
}

#define ROPE(SUFFIX, T)                                                                                                \
    extern "C" __global__ void rope_##SUFFIX(T *out, const T *xs, const T *cos, const T *sin,                          \
                                             unsigned long long pair_count, unsigned heads, unsigned positions,        \
                                             unsigned pairs, unsigned table_rows, float direction, int interleaved) {  \
        rope(out, xs, cos, sin, pair_count, heads, positions, pairs, table_rows, direction, interleaved);              \
    }

ROPE(f32, float)
ROPE(bf16, Bf16)
ROPE(f16, F16)
