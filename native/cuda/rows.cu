// Moves of rows: a warp copies one row of one token, in the widest words that its addresses and its length allow, so bytes arrive as
// they are. Host memory is written and read straight across the bus where it is pinned.
#include "cuda/device.h"

namespace asrkf::cuda {

namespace {

constexpr uint32_t THREADS = 128, WARPS = THREADS / WARP;

template <typename Word> __device__ __forceinline__ void copy_words(uint8_t * to, const uint8_t * from, uint32_t n_bytes, uint32_t lane) {
    for (uint32_t i = lane; i < n_bytes / sizeof(Word); i += WARP) {
        reinterpret_cast<Word *>(to)[i] = reinterpret_cast<const Word *>(from)[i];
    }
}

// grid: [rows of a slice / WARPS, slices]
__global__ void __launch_bounds__(THREADS) copy_rows(uint8_t * crossing, bool to_crossing) {
    const row_slice slice = reinterpret_cast<const row_slice *>(crossing)[blockIdx.y];
    const uint32_t  row   = blockIdx.x*WARPS + threadIdx.x / WARP;
    const uint32_t  lane  = threadIdx.x % WARP;
    if (row >= slice.n_rows) {
        return;
    }
    const uint32_t  number = reinterpret_cast<const uint32_t *>(crossing + slice.cells_at)[row];
    uint8_t *       cell   = slice.base + number*slice.stride;
    uint8_t *       ours   = crossing + slice.rows_at + size_t(row)*slice.row_bytes;
    uint8_t *       to     = to_crossing ? ours : cell;
    const uint8_t * from   = to_crossing ? cell : ours;
    const size_t    all    = reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | slice.row_bytes;
    if (all % 16 == 0) {
        copy_words<uint4>(to, from, slice.row_bytes, lane);
    } else if (all % 4 == 0) {
        copy_words<uint32_t>(to, from, slice.row_bytes, lane);
    } else if (all % 2 == 0) {
        copy_words<uint16_t>(to, from, slice.row_bytes, lane);
    } else {
        copy_words<uint8_t>(to, from, slice.row_bytes, lane);
    }
}

} // namespace

failure lacks_row_kernel() { return is_missing(copy_rows); }

failure move_rows(uint8_t * crossing, uint32_t n_slices, uint32_t most_rows, bool to_crossing, cudaStream_t stream) {
    constexpr uint32_t MOST_SLICES = 65535; // of a grid's second dimension, on any card
    if (n_slices > MOST_SLICES) {
        return "too many tensors for one launch";
    }
    const dim3 grid(most_rows / WARPS + (most_rows % WARPS > 0), n_slices, 1);
    return most_rows == 0 || n_slices == 0 ? nullptr : launch(copy_rows, grid, THREADS, stream, crossing, to_crossing);
}

} // namespace asrkf::cuda
