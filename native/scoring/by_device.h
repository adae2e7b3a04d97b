// What layers have of their own is kept device by device.
#pragma once

#include "common.h"

#include "ggml-backend.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

namespace asrkf {

// The CPU where a buffer type names no device: host memory.
ggml_backend_dev_t device_of(ggml_backend_buffer_type_t buft);

// The one of these backends that computes there. Throws error(ASRKF_UNSUPPORTED) if none does.
ggml_backend_t backend_of(ggml_backend_buffer_type_t buft, const std::vector<ggml_backend_t> & backends);

// Bytes on all devices.
inline size_t sum_of(const std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> & sizes) {
    size_t sum = 0;
    for (const auto & [buft, n_bytes] : sizes) {
        sum += n_bytes;
    }
    return sum;
}

// The part whose memory is of this type; a new one, if there is none yet.
template <typename Part> Part & part_of(std::vector<std::unique_ptr<Part>> & parts, ggml_backend_buffer_type_t buft) {
    const auto found = std::find_if(parts.begin(), parts.end(), [&](const auto & p) { return p->buft == buft; });
    if (found != parts.end()) {
        return **found;
    }
    parts.push_back(std::make_unique<Part>());
    parts.back()->buft = buft;
    return *parts.back();
}

} // namespace asrkf
