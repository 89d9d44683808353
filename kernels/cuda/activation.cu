// GELU, SiLU and SwiGLU with the formulas of kernels/src/ops/activation.rs, in f32 whatever the elements are
// stored in.
#include "element.cuh"

constexpr float TWO_SQRT_2_OVER_PI = 1.595769f;
constexpr float CUBIC = 0.044715f;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float gelu(float x) {
    return x * sigmoid(TWO_SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
}

__device__ __forceinline__ float gelu_slope(float x) {
    float s = sigmoid(TWO_SQRT_2_OVER_PI * (x + CUBIC * x * x * x));
    return s + x * s * (1.0f - s) * (TWO_SQRT_2_OVER_PI * (1.0f + 3.0f * CUBIC * x * x));
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

__device__ __forceinline__ float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

template <class T, class Function>
__device__ __forceinline__ void forward(T *out, const T *xs, unsigned long long elements, Function function) {
    bool aligned = four_aligned(out) && four_aligned(xs);
    for (unsigned long long four = first_index(); 4 * four < elements; four += index_stride()) {
        unsigned long long start = 4 * four;
        if (aligned && start + 4 <= elements) {
            Four<T> x = load_four(xs + start);
            for (int i = 0; i < 4; i++) x.at[i] = narrow<T>(function(widen(x.at[i])));
            store_four(out + start, x);
        } else {
            for (unsigned long long at = start; at < elements && at < start + 4; at++) {
                out[at] = narrow<T>(function(widen(xs[at])));
            }
        }
    }
}

template <class T, class Slope>
__device__ __forceinline__ void backward(T *dx, const T *xs, const T *dy, unsigned long long elements,
                                         Slope slope) {
    bool aligned = four_aligned(dx) && four_aligned(xs) && four_aligned(dy);
    for (unsigned long long four = first_index(); 4 * four < elements; four += index_stride()) {
        unsigned long long start = 4 * four;
        if (aligned && start + 4 <= elements) {
            Four<T> x = load_four(xs + start), g = load_four(dy + start);
            for (int i = 0; i < 4; i++) x.at[i] = narrow<T>(widen(g.at[i]) * slope(widen(x.at[i])));
            store_four(dx + start, x);
        } else {
            for (unsigned long long at = start; at < elements && at < start + 4; at++) {
                dx[at] = narrow<T>(widen(dy[at]) * slope(widen(xs[at])));
            }
        }
    }
}

// Rows of `width` elements from rows of twice that: gates, then what they let through.
template <class T>
__device__ __forceinline__ void swiglu_forward(T *out, const T *xs, unsigned long long elements,
                                               unsigned width) {
    if (width % 4 == 0 && four_aligned(out) && four_aligned(xs)) {
        for (unsigned long long at = 4 * first_index(); at < elements; at += 4 * index_stride()) {
            unsigned long long gate = at + divide(at, width) * width;
            Four<T> x = load_four(xs + gate), up = load_four(xs + gate + width);
            for (int i = 0; i < 4; i++) x.at[i] = narrow<T>(silu(widen(x.at[i])) * widen(up.at[i]));
            store_four(out + at, x);
        }
    } else {
        for (unsigned long long at = first_index(); at < elements; at += index_stride()) {
            unsigned long long gate = at + divide(at, width) * width;
            out[at] = narrow<T>(silu(widen(xs[gate])) * widen(xs[gate + width]));
        }
    }
}

template <class T>
__device__ __forceinline__ void swiglu_backward(T *dx, const T *xs, const T *dy, unsigned long long elements,
                                                unsigned width) {
    if (width % 4 == 0 && four_aligned(dx) && four_aligned(xs) && four_aligned(dy)) {
        for (unsigned long long at = 4 * first_index(); at < elements; at += 4 * index_stride()) {
            unsigned long long gate = at + divide(at, width) * width;
            Four<T> x = load_four(xs + gate), up = load_four(xs + gate + width), g = load_four(dy + at);
            for (int i = 0; i < 4; i++) {
                float value = widen(x.at[i]), upstream = widen(g.at[i]);
                x.at[i] = narrow<T>(upstream * widen(up.at[i]) * silu_slope(value));
                up.at[i] = narrow<T>(upstream * silu(value));
            }
            store_four(dx + gate, x);
            store_four(dx + gate + width, up);
        }
    } else {
        for (unsigned long long at = first_index(); at < elements; at += index_stride()) {
            unsigned long long gate = at + divide(at, width) * width;
            float value = widen(xs[gate]), upstream = widen(dy[at]);
            dx[gate] = narrow<T>(upstream * widen(xs[gate + width]) * silu_slope(value));
            dx[gate + width] = narrow<T>(upstream * silu(value));
        }
    }
}

#define ACTIVATIONS(SUFFIX, T)                                                                               \
    extern "C" __global__ void gelu_forward_##SUFFIX(T *out, const T *xs, unsigned long long elements) {     \
        forward(out, xs, elements, gelu);                                                                    \
    }                                                                                                        \
    extern "C" __global__ void gelu_backward_##SUFFIX(T *dx, const T *xs, const T *dy,                       \
                                                      unsigned long long elements) {                         \
        backward(dx, xs, dy, elements, gelu_slope);                                                          \
    }                                                                                                        \
    extern "C" __global__ void silu_forward_##SUFFIX(T *out, const T *xs, unsigned long long elements) {     \
        forward(out, xs, elements, silu);                                                                    \
    }                                                                                                        \
    extern "C" __global__ void silu_backward_##SUFFIX(T *dx, const T *xs, const T *dy,                       \
                                                      unsigned long long elements) {                         \
        backward(dx, xs, dy, elements, silu_slope);                                                          \
    }                                                                                                        \
    extern "C" __global__ void swiglu_forward_##SUFFIX(T *out, const T *xs, unsigned long long elements,     \
                                                       unsigned width) {                                     \
        swiglu_forward(out, xs, elements, width);                                                            \
    }                                                                                                        \
    extern "C" __global__ void swiglu_backward_##SUFFIX(T *dx, const T *xs, const T *dy,                     \
                                                        unsigned long long elements, unsigned width) {       \
        swiglu_backward(dx, xs, dy, elements, width);                                                        \
    }

ACTIVATIONS(f32, float)
ACTIVATIONS(bf16, Bf16)
ACTIVATIONS(f16, F16)
