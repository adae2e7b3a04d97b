#include "scoring/device_scorer.h"

#include "scoring/by_device.h"

#include <algorithm>

namespace asrkf {

namespace {

constexpr uint32_t ROWS_UNIT = 256; // rows that are scored: so many, or a multiple

std::vector<scorer_kind> & all_kinds() { // not a global: kinds are added while globals are made
    static std::vector<scorer_kind> kinds;
    return kinds;
}

} // namespace

uint32_t device_part::n_heads() const {
    uint32_t n = 0;
    for (const size_t i : layers) {
        n += uint32_t(kept->layers()[i].n_head);
    }
    return n;
}

std::vector<device_part> parts_of(const relevance & kept, const std::vector<scoring_shape> & largest, bool no_alloc) {
    std::vector<device_part> parts;
    for (size_t i = 0; i < kept.layers().size(); ++i) {
        const ggml_backend_buffer_type_t buft = kept.layers()[i].buft;
        auto found = std::find_if(parts.begin(), parts.end(), [&](const device_part & p) { return p.buft == buft; });
        if (found == parts.end()) {
            parts.push_back({ &kept, buft, device_of(buft), {}, largest, no_alloc });
            found = parts.end() - 1;
        }
        found->layers.push_back(i);
    }
    return parts;
}

uint32_t rows_to_score(uint32_t n_used, uint32_t n_rows) {
    uint32_t units = (std::max(n_used, 1u) + ROWS_UNIT - 1) / ROWS_UNIT, step = 1;
    while (units / step >= 8) {
        step *= 2;
    }
    units = (units + step - 1) / step * step;
    return std::min(n_rows, units*ROWS_UNIT);
}

bool add_scorer_kind(const scorer_kind & kind) {
    all_kinds().insert(all_kinds().begin(), kind);
    return true;
}

const std::vector<scorer_kind> & scorer_kinds() { return all_kinds(); }

} // namespace asrkf
