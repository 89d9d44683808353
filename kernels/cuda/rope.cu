// Rotary position embedding with the formulas of kernels/src/ops/rope.rs. A warp takes row after row, a lane pair after pair.
#include "element.cuh"

// `xs` is [B, heads, positions, 2·pairs]; a sequence's rows of `cos` and `sin`, `pairs` wide, start `table_rows` after those of
// the one before. `direction` is 1 forward and −1 backward.
template <class T>
__device__ __forceinline__ void rope(T *out, const T *xs, const T *cos, const T *sin, unsigned long long rows,
                                     unsigned heads, unsigned positions, unsigned pairs, unsigned table_rows,
                                     float direction, int interleaved) {
    for (unsigned long long row = first_index() / 32; row < rows; row += index_stride() / 32) {
        unsigned long long head = divide(row, positions), sequence = divide(head, heads);
        unsigned long long table = (sequence * table_rows + row - head * positions) * pairs;
        for (unsigned pair = threadIdx.x % 32; pair < pairs; pair += 32) {
            float c = widen(cos[table + pair]), s = direction * widen(sin[table + pair]);
            unsigned long long first = row * 2 * pairs + (interleaved ? 2 * pair : pair);
            unsigned long long second = first + (interleaved ? 1 : pairs);
            float a = widen(xs[first]), b = widen(xs[second]);
            out[first] = narrow<T>(a * c - b * s);
            out[second] = narrow<T>(a * s + b * c);
        }
    }
}

#define ROPE(SUFFIX, T)                                                                                                \
    extern "C" __global__ void rope_##SUFFIX(T *out, const T *xs, const T *cos, const T *sin, unsigned long long rows, \
                                             unsigned heads, unsigned positions, unsigned pairs, unsigned table_rows,  \
                                             float direction, int interleaved) {                                       \
        rope(out, xs, cos, sin, rows, heads, positions, pairs, table_rows, direction, interleaved);                    \
    }

ROPE(f32, float)
ROPE(bf16, Bf16)
ROPE(f16, F16)
