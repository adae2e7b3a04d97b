// Moves raw cache rows between device cells and host memory, for all layer groups of a context. Knows ggml's tensors and
// backends, no model and no policy.
//
// A token's bytes in a group are its row in every tensor (K and V of each layer), in the order of the tensors. Where the
// buffers are host memory, rows are copied by memcpy (direct). Elsewhere, and where staged mode is asked for, a call is one
// transfer a device, whatever the number of groups: get() uploads the cells' numbers, gathers on the device into a staging
// buffer, and downloads that; set() uploads numbers and rows together, and scatters them. The staging buffer holds 64
// tokens of all groups; what is larger goes in pieces. ggml's get_rows converts F16 and quantised rows, so the rows are viewed
// as F32 words; rows that are no whole number of words are copied one by one. A device with a copier (row_copier.h) moves rows by
// that instead of a graph, and without a staging buffer where it reaches the host's memory itself.
//
// Nobody waits for a staged transfer. A backend does what it is given in order, and the model's graphs run on the same one:
// a gather has read its cells before a later set(), or the next step's graph, writes them, and a scatter has written its
// cells before a graph reads them. Host memory of a transfer is used again only after its event. So the bytes of a get() are
// at their host addresses after settle(), which is called before anybody reads them: see host_store::data().
#pragma once

#include "common.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace asrkf {

struct host_budget;

// For tests: the n-th move of this thread from now on fails halfway; 0: none.
extern thread_local uint32_t fail_move_in;

constexpr size_t STAGING_ROWS = 64; // of each group, that a device's staging buffer holds

class row_mover {
public:
    struct row {
        size_t    group;
        uint32_t  cell;
        uint8_t * host; // token_bytes(group)
    };

    // tensors, by group: [row elements, n_cells] or [row elements, n_cells, n_stream], allocated; cells are numbered through.
    // Throws error(ASRKF_UNSUPPORTED) if direct is impossible. budget: notes whether memory could be pinned.
    row_mover(const std::vector<std::vector<ggml_tensor *>> & tensors, moves_kind kind, host_budget & budget);
    // What is on its way is lost. The backends may be gone by now.
    ~row_mover();
    row_mover(const row_mover &) = delete;
    row_mover & operator=(const row_mover &) = delete;

    size_t token_bytes(size_t group) const { return groups[group].token_bytes; }
    bool   is_staged(size_t group)   const { return groups[group].is_staged; }
    size_t staging_bytes() const; // on devices
    std::vector<std::string> notes() const; // a sentence each: why a device's rows are not moved as fast as they could be

    // Staged mode: find the backends of the buffers (those that compute the context's graphs).
    void attach(const std::vector<ggml_backend_t> & backends);
    bool is_attached() const { return lanes.empty() || attached; }

    // Rows to, and from, their host addresses; those of a group beside each other. The device must have finished with cells that
    // are moved directly or one by one. What get() brings is there after settle(); set() has read its rows when it returns, and
    // they must be there. Throws error(ASRKF_MOVE_FAILED); the host side of get() and the device side of set() are then
    // undefined, everything else is as it was, and nothing is on its way.
    void get(const std::vector<row> & rows) { move(rows, true); }
    void set(const std::vector<row> & rows) { move(rows, false); }
    void settle();

private:
    struct row_tensor {
        ggml_tensor * tensor;
        size_t        row_bytes;
        size_t        offset; // within a token
    };
    struct group_rows {
        size_t                  token_bytes = 0;
        bool                    is_staged   = false;
        std::vector<row_tensor> direct; // host memory
        std::vector<row_tensor> one_by_one;
    };
    struct crossing;
    struct lane; // the tensors of one device buffer type and their staging

    lane & lane_of(ggml_backend_buffer_type_t buft);
    void   move(const std::vector<row> & rows, bool to_host);

    std::vector<group_rows>            groups;
    std::vector<std::unique_ptr<lane>> lanes;
    bool                               attached = false;
};

} // namespace asrkf
