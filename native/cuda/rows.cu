// Moves of rows: a warp copies one row of one token, in the widest words that its addresses and its length allow, so bytes arrive as
// they are. Host memory is written and read straight across the bus where it is pinned.
#include "cuda/device.h"

namespace asrkf::cuda {

namespace {

constexpr uint32_t THREADS = 128;

template <typename Word> __device__ __forceinline__ void copy_words(uint8_t * to, const uint8_t * from, uint32_t n_bytes, uint32_t lane) {
    for (uint32_t i = lane; i < n_bytes / sizeof(Word); i += WARP) {
        reinterpret_cast<Word *>(to)[i] = reinterpret_cast<const Word *>(from)[i];
    }
}

__global__ void __launch_bounds__(THREADS) copy_rows(const row_part * __restrict__ parts, uint32_t n_parts, const uint32_t * __restrict__ cells,
        uint32_t n_cells, uint8_t * staging, size_t token_bytes, bool to_staging) {
    const size_t   row  = blockIdx.x*size_t(THREADS / WARP) + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP;
    if (row >= size_t(n_parts)*n_cells) {
        return;
    }
    const row_part part = parts[row % n_parts]; // a token's rows lie side by side in the staging buffer
    const size_t   token = row / n_parts;
    uint8_t *       cell = part.base + cells[token]*part.stride;
    uint8_t *       host = staging + token*token_bytes + part.offset;
    uint8_t *       to   = to_staging ? host : cell;
    const uint8_t * from = to_staging ? cell : host;
    const size_t    all  = reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | part.row_bytes;
    if (all % 16 == 0) {
        copy_words<uint4>(to, from, part.row_bytes, lane);
    } else if (all % 4 == 0) {
        copy_words<uint32_t>(to, from, part.row_bytes, lane);
    } else if (all % 2 == 0) {
        copy_words<uint16_t>(to, from, part.row_bytes, lane);
    } else {
        copy_words<uint8_t>(to, from, part.row_bytes, lane);
    }
}

} // namespace

failure move_rows(const row_part * parts, uint32_t n_parts, const uint32_t * cells, uint32_t n_cells, uint8_t * staging, size_t token_bytes,
        bool to_staging, cudaStream_t stream) {
    const size_t n_rows = size_t(n_parts)*n_cells, n_blocks = (n_rows + THREADS/WARP - 1) / (THREADS/WARP);
    if (n_blocks > 0x7fffffffu) {
        return "too many rows for one launch";
    }
    return n_rows == 0 ? nullptr : launch(copy_rows, dim3(uint32_t(n_blocks), 1, 1), THREADS, stream, parts, n_parts, cells, n_cells, staging, token_bytes, to_staging);
}

} // namespace asrkf::cuda
