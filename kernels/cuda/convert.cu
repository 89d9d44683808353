// Conversions between f32 and the 16-bit types, with the bits of kernels/src/convert.rs.
#include "element.cuh"

template <class From, class To>
__device__ __forceinline__ void convert(const From *from, To *to, unsigned long long elements) {
    bool aligned = four_aligned(from) && four_aligned(to);
    for (unsigned long long four = first_index(); 4 * four < elements; four += index_stride()) {
        unsigned long long start = 4 * four;
        if (aligned && start + 4 <= elements) {
            Four<From> source = load_four(from + start);
            Four<To> target;
            for (int i = 0; i < 4; i++) target.at[i] = narrow<To>(widen(source.at[i]));
            store_four(to + start, target);
        } else {
            for (unsigned long long at = start; at < elements && at < start + 4; at++)
                to[at] = narrow<To>(widen(from[at]));
        }
    }
}

#define CONVERT(NAME, FROM, TO)                                                                              \
    extern "C" __global__ void NAME(const FROM *from, TO *to, unsigned long long elements) {                 \
        convert(from, to, elements);                                                                         \
    }

CONVERT(narrow_bf16, float, Bf16)
CONVERT(narrow_f16, float, F16)
CONVERT(widen_bf16, Bf16, float)
CONVERT(widen_f16, F16, float)
