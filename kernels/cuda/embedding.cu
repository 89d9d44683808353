// Rows of a table by index, and the sums of gradients that come back to the rows.
#include "element.cuh"
#include "reduce.cuh"

// A thread block takes token after token.
template <class T>
__device__ __forceinline__ void embedding_forward(T *out, const T *weight, const unsigned *tokens,
                                                  unsigned long long count, unsigned width) {
    for (unsigned long long token = blockIdx.x; token < count; token += gridDim.x) {
        const T *row = weight + (unsigned long long)tokens[token] * width;
        T *to = out + token * width;
        for_each_four(0, width, [&](unsigned at, unsigned count) {
            if (count == 4 && four_aligned(row + at) && four_aligned(to + at)) {
                store_four(to + at, load_four(row + at));
            } else {
                for (unsigned i = 0; i < count; i++) to[at + i] = row[at + i];
            }
        });
    }
}

constexpr int THREADS = 256;

// The gradient of each row that a token names, summed in the order of the tokens; other rows are left alone.
// The thread block of a row's first token sums all of it, so that no two write to one row. 256 threads.
template <class T>
__device__ __forceinline__ void embedding_backward(T *gradient, const T *dy, const unsigned *tokens,
                                                   unsigned long long count, unsigned width) {
    __shared__ int found[THREADS];
    for (unsigned long long first = blockIdx.x; first < count; first += gridDim.x) {
        unsigned token = tokens[first];
        int seen = 0;
        for (unsigned long long at = threadIdx.x; at < first && !seen; at += THREADS)
            seen = tokens[at] == token;
        if (block_any(seen)) continue;
        // Four columns a thread at once.
        for (unsigned start = 0; start < width; start += 4 * THREADS) {
            unsigned column = start + 4 * threadIdx.x;
            unsigned columns = column >= width ? 0 : width - column < 4 ? width - column : 4;
            Four<float> sum = {};
            for (unsigned long long chunk = first; chunk < count; chunk += THREADS) {
                unsigned long long mine = chunk + threadIdx.x;
                int match = mine < count && tokens[mine] == token;
                found[threadIdx.x] = match;
                // Most chunks have none.
                if (block_any(match) && columns > 0) {
                    for (int at = 0; at < THREADS; at++) {
                        if (!found[at]) continue;
                        Four<float> upstream = widen_four(dy + (chunk + at) * width + column, columns);
                        for (int i = 0; i < 4; i++) sum.at[i] += upstream.at[i];
                    }
                }
                __syncthreads();
            }
            if (columns > 0) narrow_four(gradient + (unsigned long long)token * width + column, sum, columns);
        }
    }
}

#define EMBEDDING(SUFFIX, T)                                                                                 \
    extern "C" __global__ void embedding_forward_##SUFFIX(T *out, const T *weight, const unsigned *tokens,   \
                                                          unsigned long long count, unsigned width) {        \
        embedding_forward(out, weight, tokens, count, width);                                                \
    }                                                                                                        \
    extern "C" __global__ void embedding_backward_##SUFFIX(T *gradient, const T *dy, const unsigned *tokens, \
                                                           unsigned long long count, unsigned width) {       \
        embedding_backward(gradient, dy, tokens, count, width);                                              \
    }

EMBEDDING(f32, float)
EMBEDDING(bf16, Bf16)
EMBEDDING(f16, F16)
