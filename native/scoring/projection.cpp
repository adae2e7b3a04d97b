#include "scoring/projection.h"

#include "ggml-backend.h"
#include "ggml.h"

namespace asrkf {

bool is_weights(const ggml_tensor * t) {
    return t && t->op == GGML_OP_NONE && t->buffer && ggml_backend_buffer_get_usage(t->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

ggml_tensor * projected_input(const ggml_tensor * q) {
    while (q && !(q->op == GGML_OP_MUL_MAT && is_weights(q->src[0]))) {
        q = q->op == GGML_OP_MUL_MAT ? q->src[1] : q->src[0]; // over rotations of a quantised cache, too
    }
    return q ? q->src[1] : nullptr;
}

} // namespace asrkf
