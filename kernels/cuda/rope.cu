// Rotary position embedding with the formulas of kernels/src/ops/rope.rs. A thread takes four
// neighbouring pairs of a row, then those of another.
#include "element.cuh"

// `xs` is [B, heads, positions, 2·pairs]; a sequence's rows of `cos` and `sin`, `pairs` wide, start
// `table_rows` after those of the one before. `direction` is 1 forward and −1 backward.
template <class T>
__device__ __forceinline__ void rope(T *out, const T *xs, const T *cos, const T *sin, unsigned long long rows,
                                     unsigned heads, unsigned positions, unsigned pairs, unsigned table_rows,
                                     float direction, int interleaved) {
    unsigned fours = (pairs + 3) / 4;
    for (unsigned long long index = first_index(); index < rows * fours; index += index_stride()) {
        unsigned long long row = divide(index, fours), head = divide(row, positions),
                           sequence = divide(head, heads);
        unsigned pair = 4 * (unsigned)(index - row * fours);
        unsigned count = pairs - pair < 4 ? pairs - pair : 4;
        unsigned long long table = (sequence * table_rows + row - head * positions) * pairs + pair;
        Four<float> c = widen_four(cos + table, count), s = widen_four(sin + table, count);
        unsigned long long start = row * 2 * pairs;
        if (interleaved) {
            // Two fours of two pairs each.
            for (unsigned half = 0; half < 2; half++) {
                if (2 * half >= count) break;
                unsigned long long at = start + 2 * pair + 4 * half;
                unsigned elements = count - 2 * half < 2 ? 2 : 4;
                Four<float> x = widen_four(xs + at, elements);
                for (int i = 0; i < 2; i++) {
                    float a = x.at[2 * i], b = x.at[2 * i + 1];
                    float turn_c = c.at[2 * half + i], turn_s = direction * s.at[2 * half + i];
                    x.at[2 * i] = a * turn_c - b * turn_s;
                    x.at[2 * i + 1] = a * turn_s + b * turn_c;
                }
                narrow_four(out + at, x, elements);
            }
        } else {
            Four<float> a = widen_four(xs + start + pair, count),
                        b = widen_four(xs + start + pairs + pair, count);
            for (int i = 0; i < 4; i++) {
                float first = a.at[i], second = b.at[i], turn_s = direction * s.at[i];
                a.at[i] = first * c.at[i] - second * turn_s;
                b.at[i] = first * turn_s + second * c.at[i];
            }
            narrow_four(out + start + pair, a, count);
            narrow_four(out + start + pairs + pair, b, count);
        }
    }
}

#define ROPE(SUFFIX, T)                                                                                      \
    extern "C" __global__ void rope_##SUFFIX(                                                                \
        T *out, const T *xs, const T *cos, const T *sin, unsigned long long rows, unsigned heads,            \
        unsigned positions, unsigned pairs, unsigned table_rows, float direction, int interleaved) {         \
        rope(out, xs, cos, sin, rows, heads, positions, pairs, table_rows, direction, interleaved);          \
    }

ROPE(f32, float)
ROPE(bf16, Bf16)
ROPE(f16, F16)
