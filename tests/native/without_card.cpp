// Linked with CUDA's real runtime, as tests/test_cuda.py does: what an index that lies on no card gets from our kernels' host code.
#include "cuda/scorer.h"

#include <cstdio>

int main() {
    const asrkf::relevance kept({ { 0, 64, 4, 2, ggml_backend_cpu_buffer_type() } }, 512, 1, 8, GGML_TYPE_Q4_0, asrkf::SCORE_ATTENTION, 0, false);
    try {
        asrkf::cuda::make_scorer(asrkf::parts_of(kept, { { 0, 4, false, false } }, false)[0]);
        std::printf("made\n");
    } catch (const asrkf::error & e) {
        std::printf("status %d: %s\n", int(e.status), e.what());
    }
    std::printf("%zu kinds of scorers\n", asrkf::scorer_kinds().size());
}
