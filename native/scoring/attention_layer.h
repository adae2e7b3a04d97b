// A layer's attention, as all that scores it needs to know it.
#pragma once

#include "ggml-backend.h"

#include <cstdint>

namespace asrkf {

struct attention_layer {
    uint32_t                   il;
    int64_t                    head; // elements of one head's key
    int64_t                    n_head;
    int64_t                    n_head_kv;
    ggml_backend_buffer_type_t buft; // where its cache is
};

} // namespace asrkf
