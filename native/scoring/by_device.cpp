#include "scoring/by_device.h"

namespace asrkf {

ggml_backend_dev_t device_of(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
    return dev ? dev : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

ggml_backend_t backend_of(ggml_backend_buffer_type_t buft, const std::vector<ggml_backend_t> & backends) {
    const auto found = std::find_if(backends.begin(), backends.end(), [&](ggml_backend_t b) { return ggml_backend_get_device(b) == device_of(buft); });
    if (found == backends.end()) {
        throw error(ASRKF_UNSUPPORTED, format("no backend of this context computes on %s", ggml_backend_buft_name(buft)));
    }
    return *found;
}

} // namespace asrkf
