// Moves raw cache rows between device cells and host memory. Knows ggml's tensors and backends, no model and no policy.
//
// A token's bytes are its row in every tensor (K and V of each layer), in the order of the tensors. Where the buffers
// are host memory, rows are copied by memcpy (direct). Elsewhere, and where staged mode is asked for, rows are gathered on
// the device into a staging buffer and cross in one transfer for 64 tokens and device, and the same backwards. ggml's
// get_rows converts F16 and quantised rows, so the rows are viewed as F32 words; rows that are no whole number of
// words are copied one by one.
//
// The caller sees to it that the device has finished with the rows (ggml_backend_sched_synchronize), and must not run
// anything else on the backends during a call.
#pragma once

#include "common.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace asrkf {

// For tests: the n-th move of this thread from now on fails halfway; 0: none.
extern thread_local uint32_t fail_move_in;

class row_mover {
public:
    // tensors: [row elements, n_cells] or [row elements, n_cells, n_stream], allocated; cells are numbered through. Throws error(ASRKF_UNSUPPORTED) if direct is impossible.
    row_mover(const std::vector<ggml_tensor *> & tensors, moves_kind kind);
    ~row_mover();
    row_mover(const row_mover &) = delete;
    row_mover & operator=(const row_mover &) = delete;

    size_t token_bytes() const { return bytes_per_token; }
    bool   is_staged() const { return staged; }
    size_t staging_bytes() const; // on devices

    // Staged mode: find the backends of the buffers (those that compute the context's graphs).
    void attach(const std::vector<ggml_backend_t> & backends);
    bool is_attached() const { return !staged || attached; }

    // The bytes of n cells to, and from, n host addresses. Throws error(ASRKF_MOVE_FAILED); the host side of get() and
    // the device side of set() are then undefined, everything else is as it was.
    void get(const uint32_t * cells, uint8_t * const * hosts, size_t n);
    void set(const uint32_t * cells, const uint8_t * const * hosts, size_t n);

private:
    struct row_tensor {
        ggml_tensor * tensor;
        size_t        row_bytes;
        size_t        offset; // within a token
    };
    struct lane; // the tensors of one device buffer type and their staging

    void move(const uint32_t * cells, uint8_t * const * hosts, size_t n, bool to_host);

    std::vector<row_tensor>            direct;   // host memory
    std::vector<row_tensor>            one_by_one;
    std::vector<std::unique_ptr<lane>> lanes;
    size_t                             bytes_per_token = 0;
    bool                               staged          = false;
    bool                               attached        = false;
};

} // namespace asrkf
