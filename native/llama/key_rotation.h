// How a model turns the keys of a layer by their positions (RoPE), as its own graph says it: layers differ, some do not turn theirs at
// all, and what a model's parameters say of that is not the whole truth. Knows ggml only.
#pragma once

#include <cstdint>

struct ggml_context;
struct ggml_tensor;

namespace asrkf {

struct key_rotation {
    enum class kind { none, rope, other }; // other: what follows the rotation does not commute with it, so keys cannot be turned on

    kind                is = kind::none;
    int32_t             n_dims = 0, first_dim = 0, mode = 0, n_ctx_orig = 0; // of ggml_rope_ext()
    float               freq_base = 0, freq_scale = 0, ext_factor = 0, beta_fast = 0, beta_slow = 0;
    const ggml_tensor * factors = nullptr; // of the model; null: none
};

// k: a layer's keys as its graph gives them to the cache.
key_rotation rotation_of(const ggml_tensor * k);

// keys: [elements of a head, heads, tokens], F32 or F16, turned in place by so many positions each. factors: null, or a copy of the rotation's.
ggml_tensor * turn(ggml_context * ctx, const key_rotation & how, ggml_tensor * keys, ggml_tensor * by, ggml_tensor * factors);

} // namespace asrkf
