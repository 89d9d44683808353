// Block-wise 8-bit numbers, with the bits of kernels/src/quantize.rs. A warp takes block after block of 256 elements: two fours a
// lane.
#include "element.cuh"
#include "reduce.cuh"

constexpr int BLOCK_ELEMENTS = 256;
constexpr unsigned LARGEST_FINITE_BITS = 0x7f7fffff;
constexpr unsigned MAGNITUDE_BITS = 0x7fffffff;

struct Signed {
    static constexpr unsigned BIAS = 15, LARGEST = 0x7f, SMALLEST = 0, SIGN = 0x80;
};
struct Unsigned {
    static constexpr unsigned BIAS = 31, LARGEST = 0xff, SMALLEST = 1, SIGN = 0;
};

// NaN is above infinity, and what the code cannot say above both.
template <class Format> __device__ __forceinline__ unsigned rank(float value) {
    unsigned bits = __float_as_uint(__fadd_rn(value, 0.0f));
    return Format::SIGN == 0 ? bits : bits & MAGNITUDE_BITS;
}

template <class Format> __device__ __forceinline__ unsigned char encode(float value) {
    unsigned bits = __float_as_uint(value);
    unsigned magnitude = bits & MAGNITUDE_BITS;
    unsigned normal = (magnitude - ((127 - Format::BIAS) << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
    float shift = __uint_as_float((127 + 21 - Format::BIAS) << 23);
    unsigned subnormal = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), shift)) - __float_as_uint(shift);
    unsigned rounded = magnitude < ((128 - Format::BIAS) << 23) ? subnormal : normal;
    unsigned smallest = magnitude == 0 ? 0 : Format::SMALLEST;
    rounded = rounded < Format::LARGEST ? rounded : Format::LARGEST;
    rounded = rounded > smallest ? rounded : smallest;
    return (unsigned char)(rounded | ((bits >> 24) & Format::SIGN));
}

template <class Format> __device__ __forceinline__ float decode(unsigned char code) {
    float tiny = __uint_as_float((code & Format::LARGEST) << 20);
    float magnitude = __fmul_rn(tiny, __uint_as_float((254 - Format::BIAS) << 23));
    return __uint_as_float(__float_as_uint(magnitude) | (code & Format::SIGN) << 24);
}

template <class Format>
__device__ __forceinline__ void quantize(const float *from, unsigned char *codes, float *scales,
                                         unsigned long long elements) {
    bool aligned = four_aligned(from) && four_aligned(codes);
    int lane = threadIdx.x % 32;
    unsigned long long blocks = (elements + BLOCK_ELEMENTS - 1) / BLOCK_ELEMENTS;
    for (unsigned long long block = first_index() / 32; block < blocks; block += index_stride() / 32) {
        Four<float> values[2];
        unsigned largest = 0;
        for (int half = 0; half < 2; half++) {
            unsigned long long start = block * BLOCK_ELEMENTS + half * 128 + 4 * lane;
            if (aligned && start + 4 <= elements) {
                values[half] = load_four(from + start);
            } else {
                for (int i = 0; i < 4; i++) values[half].at[i] = start + i < elements ? from[start + i] : 0.0f;
            }
            for (int i = 0; i < 4; i++) {
                unsigned mine = rank<Format>(values[half].at[i]);
                largest = mine > largest ? mine : largest;
            }
        }
        largest = warp_reduce(largest, [](unsigned a, unsigned b) { return a > b ? a : b; });
        bool finite = largest <= LARGEST_FINITE_BITS;
        float scale = finite ? __fdiv_rn(__uint_as_float(largest), 1.875f) : __uint_as_float(0x7fc00000);
        float divisor = largest == 0 ? 1.0f : scale;
        if (lane == 0) scales[block] = scale;
        for (int half = 0; half < 2; half++) {
            unsigned long long start = block * BLOCK_ELEMENTS + half * 128 + 4 * lane;
            Four<unsigned char> code;
            for (int i = 0; i < 4; i++) {
                code.at[i] = finite ? encode<Format>(__fdiv_rn(values[half].at[i], divisor)) : 0;
            }
            if (aligned && start + 4 <= elements) {
                store_four(codes + start, code);
            } else {
                for (int i = 0; i < 4; i++) {
                    if (start + i < elements) codes[start + i] = code.at[i];
                }
            }
        }
    }
}

template <class Format>
__device__ __forceinline__ void dequantize(const unsigned char *codes, const float *scales, float *to,
                                           unsigned long long elements) {
    bool aligned = four_aligned(codes) && four_aligned(to);
    for (unsigned long long four = first_index(); 4 * four < elements; four += index_stride()) {
        unsigned long long start = 4 * four;
        float scale = scales[start / BLOCK_ELEMENTS];
        if (aligned && start + 4 <= elements) {
            Four<unsigned char> code = load_four(codes + start);
            Four<float> value;
            for (int i = 0; i < 4; i++) value.at[i] = __fmul_rn(decode<Format>(code.at[i]), scale);
            store_four(to + start, value);
        } else {
            for (unsigned long long at = start; at < elements && at < start + 4; at++) {
                to[at] = __fmul_rn(decode<Format>(codes[at]), scale);
            }
        }
    }
}

#define QUANTIZE(SUFFIX, FORMAT)                                                                                       \
    extern "C" __global__ void quantize_##SUFFIX(const float *from, unsigned char *codes, float *scales,               \
                                                 unsigned long long elements) {                                        \
        quantize<FORMAT>(from, codes, scales, elements);                                                               \
    }                                                                                                                  \
    extern "C" __global__ void dequantize_##SUFFIX(const unsigned char *codes, const float *scales, float *to,         \
                                                   unsigned long long elements) {                                      \
        dequantize<FORMAT>(codes, scales, to, elements);                                                               \
    }

QUANTIZE(signed, Signed)
QUANTIZE(unsigned, Unsigned)
