// Gradients scaled, accumulated and measured in one pass, with the bits of kernels/src/gradient.rs: blocks of
// 1024 elements, 16 interleaved sums of squares a block, then the blocks in order. No atomics.
#include "element.cuh"

constexpr int BLOCK_ELEMENTS = 1024;
constexpr int LANES = 16;
// Threads of a thread block: each takes four elements.
constexpr int THREADS = BLOCK_ELEMENTS / 4;

// A thread block takes block after block of the run, and writes each one's sum of squares and number of
// elements that are not finite.
template <class G>
__device__ __forceinline__ void accumulate(float *accumulator, const G *gradient, unsigned long long elements,
                                           float scale, int add, double *squares, unsigned *non_finite) {
    __shared__ float values[BLOCK_ELEMENTS];
    __shared__ double lane_squares[LANES];
    __shared__ unsigned lane_non_finite[LANES];
    bool aligned = four_aligned(accumulator) && four_aligned(gradient);
    unsigned long long blocks = (elements + BLOCK_ELEMENTS - 1) / BLOCK_ELEMENTS;
    for (unsigned long long block = blockIdx.x; block < blocks; block += gridDim.x) {
        unsigned long long start = block * BLOCK_ELEMENTS;
        int count = elements - start < BLOCK_ELEMENTS ? (int)(elements - start) : BLOCK_ELEMENTS;
        float *sums = accumulator + start;
        const G *gradients = gradient + start;
        int first = 4 * threadIdx.x;
        if (aligned && first + 4 <= count) {
            Four<G> g = load_four(gradients + first);
            Four<float> sum;
            if (add) sum = load_four(sums + first);
            for (int i = 0; i < 4; i++) {
                float scaled = __fmul_rn(widen(g.at[i]), scale);
                sum.at[i] = add ? __fadd_rn(sum.at[i], scaled) : scaled;
                values[first + i] = sum.at[i];
            }
            store_four(sums + first, sum);
        } else {
            for (int at = first; at < count && at < first + 4; at++) {
                float scaled = __fmul_rn(widen(gradients[at]), scale);
                float sum = add ? __fadd_rn(sums[at], scaled) : scaled;
                values[at] = sum;
                sums[at] = sum;
            }
        }
        __syncthreads();
        if (threadIdx.x < LANES) {
            double sum = 0.0;
            unsigned bad = 0;
            for (int at = threadIdx.x; at < count; at += LANES) {
                double value = values[at];
                sum = __dadd_rn(sum, __dmul_rn(value, value));
                bad += (__float_as_uint(values[at]) & 0x7f800000) == 0x7f800000;
            }
            lane_squares[threadIdx.x] = sum;
            lane_non_finite[threadIdx.x] = bad;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            double sum = 0.0;
            unsigned bad = 0;
            for (int lane = 0; lane < LANES; lane++) {
                sum = __dadd_rn(sum, lane_squares[lane]);
                bad += lane_non_finite[lane];
            }
            squares[block] = sum;
            non_finite[block] = bad;
        }
    }
}

#define ACCUMULATE(NAME, G)                                                                                  \
    extern "C" __global__ void NAME(float *accumulator, const G *gradient, unsigned long long elements,      \
                                    float scale, int add, double *squares, unsigned *non_finite) {           \
        accumulate(accumulator, gradient, elements, scale, add, squares, non_finite);                        \
    }

ACCUMULATE(accumulate_f32, float)
ACCUMULATE(accumulate_bf16, Bf16)
ACCUMULATE(accumulate_f16, F16)

// Adds the blocks' measures to the totals in order. One thread block; its threads load, one of them adds.
extern "C" __global__ void add_blocks(const double *squares, const unsigned *non_finite,
                                      unsigned long long blocks, double *total_squares,
                                      unsigned long long *total_non_finite) {
    __shared__ double chunk_squares[THREADS];
    __shared__ unsigned chunk_non_finite[THREADS];
    double sum = *total_squares;
    unsigned long long bad = *total_non_finite;
    for (unsigned long long start = 0; start < blocks; start += THREADS) {
        unsigned long long mine = start + threadIdx.x;
        if (mine < blocks) {
            chunk_squares[threadIdx.x] = squares[mine];
            chunk_non_finite[threadIdx.x] = non_finite[mine];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int count = blocks - start < THREADS ? (int)(blocks - start) : THREADS;
            for (int at = 0; at < count; at++) {
                sum = __dadd_rn(sum, chunk_squares[at]);
                bad += chunk_non_finite[at];
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        *total_squares = sum;
        *total_non_finite = bad;
    }
}
