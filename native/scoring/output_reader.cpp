#include "scoring/output_reader.h"

namespace asrkf {

namespace {

std::vector<output_reader_kind> & kinds() {
    static std::vector<output_reader_kind> all;
    return all;
}

} // namespace

bool add_output_reader_kind(const output_reader_kind & kind) {
    kinds().insert(kinds().begin(), kind);
    return true;
}

std::unique_ptr<output_reader> make_device_reader(ggml_backend_dev_t device, uint32_t n_slots, std::string & why_not) {
    for (const output_reader_kind & kind : kinds()) {
        if (!kind.serves(device)) {
            continue;
        }
        try {
            return kind.make(device, n_slots);
        } catch (const error & e) {
            why_not = format("outputs on %s are read by the host: %s", ggml_backend_dev_name(device), e.what());
        }
    }
    return nullptr;
}

} // namespace asrkf
