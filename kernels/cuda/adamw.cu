// AdamW on flat runs, with the bits of kernels/src/adamw.rs: the same IEEE operations in the same order, none
// contracted.
#include "element.cuh"

// `Numbers` of kernels/src/adamw.rs.
struct Numbers {
    float gradient_scale;
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float first_correction;
    float second_correction;
    float keep;
    float learning_rate;
    float epsilon;
};

__device__ __forceinline__ void update(const Numbers &numbers, float &master, float &first, float &second,
                                       float gradient) {
    float g = __fmul_rn(gradient, numbers.gradient_scale);
    float m = __fadd_rn(__fmul_rn(first, numbers.beta1), __fmul_rn(g, numbers.one_minus_beta1));
    float v =
        __fadd_rn(__fmul_rn(second, numbers.beta2), __fmul_rn(__fmul_rn(g, g), numbers.one_minus_beta2));
    float root = __fsqrt_rn(__fmul_rn(v, numbers.second_correction));
    float direction = __fdiv_rn(__fmul_rn(m, numbers.first_correction), __fadd_rn(root, numbers.epsilon));
    master = __fsub_rn(__fmul_rn(master, numbers.keep), __fmul_rn(direction, numbers.learning_rate));
    first = m;
    second = v;
}

// No copy is made where `copy` is null.
template <class G, class C>
__device__ __forceinline__ void adamw(float *master, float *first, float *second, const G *gradient, C *copy,
                                      unsigned long long elements, const Numbers &numbers) {
    bool aligned = four_aligned(master) && four_aligned(first) && four_aligned(second) &&
                   four_aligned(gradient) && four_aligned(copy);
    for (unsigned long long four = first_index(); 4 * four < elements; four += index_stride()) {
        unsigned long long start = 4 * four;
        if (aligned && start + 4 <= elements) {
            Four<float> p = load_four(master + start), m = load_four(first + start),
                        v = load_four(second + start);
            Four<G> g = load_four(gradient + start);
            for (int i = 0; i < 4; i++) update(numbers, p.at[i], m.at[i], v.at[i], widen(g.at[i]));
            store_four(master + start, p);
            store_four(first + start, m);
            store_four(second + start, v);
            if (copy) {
                Four<C> low;
                for (int i = 0; i < 4; i++) low.at[i] = narrow<C>(p.at[i]);
                store_four(copy + start, low);
            }
        } else {
            for (unsigned long long at = start; at < elements && at < start + 4; at++) {
                update(numbers, master[at], first[at], second[at], widen(gradient[at]));
                if (copy) copy[at] = narrow<C>(master[at]);
            }
        }
    }
}

#define ADAMW(NAME, G, C)                                                                                    \
    extern "C" __global__ void NAME(float *master, float *first, float *second, const G *gradient, C *copy,  \
                                    unsigned long long elements, Numbers numbers) {                          \
        adamw(master, first, second, gradient, copy, elements, numbers);                                     \
    }

ADAMW(adamw_f32_bf16, float, Bf16)
ADAMW(adamw_f32_f16, float, F16)
ADAMW(adamw_bf16_bf16, Bf16, Bf16)
ADAMW(adamw_bf16_f16, Bf16, F16)
ADAMW(adamw_f16_bf16, F16, Bf16)
ADAMW(adamw_f16_f16, F16, F16)
