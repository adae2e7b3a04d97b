// What output rows say of the next token, read where their logits are. The host does it from a copy of the row (llama/outputs.h). A
// device that can compute the three figures itself names that here, so that no room need know it. Both give the same, but for rounding.
#pragma once

#include "common.h"

#include "ggml-backend.h"

#include <memory>
#include <vector>

namespace asrkf {

class output_reader {
public:
    // Waits for what is still on its way. The backend may be gone by now.
    virtual ~output_reader() = default;

    // Does it read a row more cheaply than the host, which has it anyway?
    virtual bool beats_host() const = 0;
    // A row as the work that the backend has by now will leave it; what the backend gets later comes after it. Returns at once.
    // slot: where the figures are kept, until the next row for it. Throws error(ASRKF_INTERNAL) if the device fails.
    virtual void read(ggml_backend_t backend, const ggml_tensor * logits, uint32_t row, uint32_t slot) = 0;
    // Waits for them. All three are NaN if a logit is. Throws as read() does.
    virtual asrkf_output of(uint32_t slot) = 0;
};

// A kind of reader that serves some devices in place of the host.
struct output_reader_kind {
    bool (*serves)(ggml_backend_dev_t device);
    std::unique_ptr<output_reader> (*make)(ggml_backend_dev_t device, uint32_t n_slots); // throws error where it cannot
};

// Asked from now on, the newest first. Returns true.
bool add_output_reader_kind(const output_reader_kind & kind);
// nullptr: there is none for this device; why_not: or there is, and that is what it said.
std::unique_ptr<output_reader> make_device_reader(ggml_backend_dev_t device, uint32_t n_slots, std::string & why_not);

} // namespace asrkf
