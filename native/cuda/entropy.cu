// Entropy of output rows: a block reads a row twice, for the highest logit and for the sums relative to it.
#include "cuda/device.h"

namespace asrkf::cuda {

namespace {

constexpr uint32_t THREADS = 1024;

struct highest {
    float top;
    __device__ highest shuffled(uint32_t distance) const { return { __shfl_xor_sync(0xffffffffu, top, int(distance)) }; }
};

struct sums {
    double plain, weighted;
    __device__ sums shuffled(uint32_t distance) const {
        return { __shfl_xor_sync(0xffffffffu, plain, int(distance)), __shfl_xor_sync(0xffffffffu, weighted, int(distance)) };
    }
};

__global__ void __launch_bounds__(THREADS) entropy_of_rows(const float * __restrict__ logits, size_t row_stride, uint32_t n, double * __restrict__ out) {
    __shared__ highest tops[THREADS / WARP];
    __shared__ sums    parts[THREADS / WARP];
    const float * row = logits + blockIdx.x*row_stride;
    highest mine = { -INFINITY };
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        mine.top = larger(mine.top, row[i]);
    }
    const float top = reduce<THREADS>(mine, tops, [](highest a, highest b) { return highest { larger(a.top, b.top) }; }).top;
    float plain = 0, weighted = 0; // of some hundred logits each: what is added up by threads is double
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        const float x = row[i] - top;
        if (x > -80.0f) {
            const float e = expf(x);
            plain    += e;
            weighted += e*x;
        }
    }
    const sums all = reduce<THREADS>(sums { double(plain), double(weighted) }, parts, [](sums a, sums b) { return sums { a.plain + b.plain, a.weighted + b.weighted }; });
    if (threadIdx.x > 0) {
        return;
    }
    double * found = out + size_t(blockIdx.x)*3;
    if (top != top) {
        found[0] = found[1] = found[2] = double(top);
    } else if (top == INFINITY || top == -INFINITY) { // one logit is infinite, or nothing is allowed
        found[0] = double(top);
        found[1] = 0;
        found[2] = top > 0 ? 1 : 0;
    } else {
        const double entropy = log(all.plain) - all.weighted / all.plain;
        found[0] = double(top) + log(all.plain);
        found[1] = entropy > 0 ? entropy : 0;
        found[2] = 1 / all.plain;
    }
}

} // namespace

failure output_entropy(const float * logits, size_t row_stride, uint32_t n, uint32_t n_rows, double * out, cudaStream_t stream) {
    if (n == 0) {
        return "rows of no logits";
    }
    return n_rows == 0 ? nullptr : launch(entropy_of_rows, dim3(n_rows, 1, 1), THREADS, stream, logits, row_stride, n, out);
}

} // namespace asrkf::cuda
