// The element types that runs and tensors have in memory, converted with the bits of kernels/src/element.rs,
// and loads and stores of four at a time.
#pragma once

struct Bf16 {
    unsigned short bits;
};
struct F16 {
    unsigned short bits;
};

__device__ __forceinline__ float widen(float value) { return value; }

__device__ __forceinline__ float widen(Bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }

__device__ __forceinline__ float widen(F16 value) {
    unsigned bits = value.bits;
    unsigned magnitude = (bits & 0x7fff) << 13;
    // Multiplying by 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
    float finite = __fmul_rn(__uint_as_float(magnitude), __uint_as_float((127 + 112) << 23));
    unsigned quiet = (bits & 0x3ff) == 0 ? 0 : 0x00400000;
    unsigned special = magnitude | 0x7f800000 | quiet;
    unsigned result = (bits & 0x7c00) == 0x7c00 ? special : __float_as_uint(finite);
    return __uint_as_float(result | (bits & 0x8000) << 16);
}

// To the nearest value, ties to even; a NaN keeps its sign and upper bits and is made quiet.
template <class T>
__device__ __forceinline__ T narrow(float value);

template <>
__device__ __forceinline__ float narrow<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ Bf16 narrow<Bf16>(float value) {
    unsigned bits = __float_as_uint(value);
    unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    unsigned nan = (bits >> 16) | 0x40;
    return Bf16{(unsigned short)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
}

template <>
__device__ __forceinline__ F16 narrow<F16>(float value) {
    unsigned bits = __float_as_uint(value);
    unsigned sign = (bits >> 16) & 0x8000;
    unsigned magnitude = bits & 0x7fffffff;
    // Normal results: move the bias from 127 to 15 and round at bit 13, ties to even.
    unsigned normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Subnormal results: adding one half puts the result's last bit at the sum's last bit, rounded by the
    // addition.
    unsigned subnormal = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0.5f)) - (126u << 23);
    unsigned nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    unsigned finite = magnitude < (113u << 23) ? subnormal : normal;
    // 65520 and above round to infinity.
    unsigned large = magnitude > 0x7f800000 ? nan : 0x7c00;
    return F16{(unsigned short)(sign | (magnitude >= 0x477ff000 ? large : finite))};
}

// Four neighbours, moved by one instruction. Their address must be a multiple of their size.
template <class T>
struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

template <class T>
__device__ __forceinline__ bool four_aligned(const T *pointer) {
    return (unsigned long long)pointer % sizeof(Four<T>) == 0;
}

template <class T>
__device__ __forceinline__ Four<T> load_four(const T *from) {
    return *reinterpret_cast<const Four<T> *>(from);
}

template <class T>
__device__ __forceinline__ void store_four(T *to, const Four<T> &four) {
    *reinterpret_cast<Four<T> *>(to) = four;
}

// Up to four neighbours: `count` of them, all of them by one instruction where the address allows. Those
// beyond are zero.
template <class T>
__device__ __forceinline__ Four<float> widen_four(const T *from, unsigned count) {
    Four<float> values;
    if (count == 4 && four_aligned(from)) {
        Four<T> four = load_four(from);
        for (int i = 0; i < 4; i++) values.at[i] = widen(four.at[i]);
    } else {
        for (int i = 0; i < 4; i++) values.at[i] = i < count ? widen(from[i]) : 0.0f;
    }
    return values;
}

template <class T>
__device__ __forceinline__ void narrow_four(T *to, const Four<float> &values, unsigned count) {
    if (count == 4 && four_aligned(to)) {
        Four<T> four;
        for (int i = 0; i < 4; i++) four.at[i] = narrow<T>(values.at[i]);
        store_four(to, four);
    } else {
        for (int i = 0; i < 4; i++) {
            if (i < count) to[i] = narrow<T>(values.at[i]);
        }
    }
}

// Gives `body` the elements from `first` to `end` of a row that are this thread's: where up to four
// neighbours start, and how many they are. Which elements are whose depends on the number of threads alone,
// not on addresses, and so do sums.
template <class Body>
__device__ __forceinline__ void for_each_four(unsigned first, unsigned end, Body body) {
    for (unsigned at = first + 4 * threadIdx.x; at < end; at += 4 * blockDim.x)
        body(at, end - at < 4 ? end - at : 4);
}

// A division that takes the short way where it can: most sizes need 32 bits, and 64-bit division is a loop of
// instructions.
__device__ __forceinline__ unsigned long long divide(unsigned long long dividend, unsigned divisor) {
    return dividend >> 32 ? dividend / divisor : (unsigned)dividend / divisor;
}

__device__ __forceinline__ unsigned long long first_index() {
    return (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ unsigned long long index_stride() {
    return (unsigned long long)gridDim.x * blockDim.x;
}
