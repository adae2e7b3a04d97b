// A device that moves rows in another way than by a graph of get_rows and set_rows names that here, so that no room need know it. Bytes
// are the same either way.
#pragma once

#include "common.h"
#include "store/row_slice.h"

#include "ggml-backend.h"

#include <memory>

namespace asrkf {

class row_copier {
public:
    // Waits for what is still on its way. The backend may be gone by now.
    virtual ~row_copier() = default;

    // Does the device read and write this host memory itself? Then rows need no staging buffer.
    virtual bool reaches(const void * host) const = 0;
    // Rows of the cells to `crossing` (to_crossing), or from there: after the work that the backend has by now, before what it gets
    // later. Returns at once. slices [n_slices]: at the beginning of `crossing`, memory that the device sees and that stays until then;
    // most_rows: of a slice. Throws error(ASRKF_MOVE_FAILED) if the device fails: nothing is on its way then.
    virtual void copy(ggml_backend_t backend, uint8_t * crossing, uint32_t n_slices, uint32_t most_rows, bool to_crossing) = 0;
};

// A kind of copier that serves some devices in place of the graph.
struct row_copier_kind {
    bool (*serves)(ggml_backend_dev_t device);
    std::unique_ptr<row_copier> (*make)(ggml_backend_dev_t device); // throws error where it cannot
};

// Asked from now on, the newest first. Returns true.
bool add_row_copier_kind(const row_copier_kind & kind);
// nullptr: there is none for this device; why_not: or there is, and that is what it said.
std::unique_ptr<row_copier> make_row_copier(ggml_backend_dev_t device, std::string & why_not);

} // namespace asrkf
