#include "store/row_copier.h"

#include <vector>

namespace asrkf {

namespace {

std::vector<row_copier_kind> & kinds() {
    static std::vector<row_copier_kind> all;
    return all;
}

} // namespace

bool add_row_copier_kind(const row_copier_kind & kind) {
    kinds().insert(kinds().begin(), kind);
    return true;
}

std::unique_ptr<row_copier> make_row_copier(ggml_backend_dev_t device, std::string & why_not) {
    for (const row_copier_kind & kind : kinds()) {
        if (!kind.serves(device)) {
            continue;
        }
        try {
            return kind.make(device);
        } catch (const error & e) {
            why_not = format("rows on %s are moved by a graph: %s", ggml_backend_dev_name(device), e.what());
        }
    }
    return nullptr;
}

} // namespace asrkf
