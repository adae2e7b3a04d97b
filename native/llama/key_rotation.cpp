#include "llama/key_rotation.h"

#include "scoring/projection.h"

#include "ggml.h"

#include <cmath>
#include <cstring>

namespace asrkf {

namespace {

// Done to a key that is turned, it is the same as done before. What weighs each element by itself is not.
bool commutes(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_SCALE:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_MUL_MAT: // the rotation of quantised keys, which is undone
            return true;
        default:
            return false;
    }
}

key_rotation read(const ggml_tensor * rope) {
    int32_t words[16]; // as ggml_rope_ext() has them
    float   numbers[16];
    static_assert(sizeof(words) <= GGML_MAX_OP_PARAMS);
    std::memcpy(words, rope->op_params, sizeof(words));
    std::memcpy(numbers, rope->op_params, sizeof(numbers));
    key_rotation r;
    r.is         = rope->src[2] && !is_weights(rope->src[2]) ? key_rotation::kind::other : key_rotation::kind::rope;
    r.n_dims     = words[1];
    r.mode       = words[2];
    r.n_ctx_orig = words[4];
    r.freq_base  = numbers[5];
    r.freq_scale = numbers[6];
    r.ext_factor = numbers[7];
    r.beta_fast  = numbers[9];
    r.beta_slow  = numbers[10];
    r.first_dim  = words[15];
    r.factors    = rope->src[2];
    return r;
}

} // namespace

key_rotation rotation_of(const ggml_tensor * k) {
    bool is_last = true, is_whole = true;
    key_rotation found;
    for (; k && !(k->op == GGML_OP_MUL_MAT && is_weights(k->src[0])); k = k->op == GGML_OP_MUL_MAT ? k->src[1] : k->src[0]) {
        if (k->op == GGML_OP_ROPE) {
            found = read(k);
            found.is = is_last ? found.is : key_rotation::kind::other;
            return found;
        }
        is_last  = is_last && commutes(k);
        is_whole = is_whole && k->op != GGML_OP_CONCAT;
    }
    found.is = is_whole ? key_rotation::kind::none : key_rotation::kind::other; // of keys in parts, one may be turned
    return found;
}

ggml_tensor * turn(ggml_context * ctx, const key_rotation & how, ggml_tensor * keys, ggml_tensor * by, ggml_tensor * factors) {
    ggml_tensor * part = ggml_view_3d(ctx, keys, how.n_dims, keys->ne[1], keys->ne[2], keys->nb[1], keys->nb[2], size_t(how.first_dim)*keys->nb[0]);
    // The keys have YaRN's magnitude already. ggml's rope gives it again, so here the factor takes it back: upstream's shift does not, and
    // makes every key of the cache larger each time.
    const float magnitude = how.ext_factor != 0 ? 1/(1 + 0.1f*std::log(1/how.freq_scale)) : 1;
    return ggml_rope_ext_inplace(ctx, part, by, factors, how.n_dims, how.mode, how.n_ctx_orig, how.freq_base, how.freq_scale, how.ext_factor, magnitude,
            how.beta_fast, how.beta_slow);
}

} // namespace asrkf
