#include "llama/creation.h"

#include "llama/refusal.h"
#include "policy/config.h"

#include "llama-arch.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace asrkf {

namespace {

// Kinds of model.
void check_model(const llama_model & model) {
    const std::string arch = model.arch_name();
    if (llm_arch_is_recurrent(model.arch)) {
        unsupported(format("%s is a recurrent model: it has no KV cache to freeze; use kv_policy=\"full\"", arch.c_str()));
    }
    if (llm_arch_is_hybrid(model.arch)) {
        unsupported(format("%s is a hybrid model (recurrent and attention layers), which the policy does not serve yet; use kv_policy=\"full\"", arch.c_str()));
    }
    if (llama_model_has_encoder(&model) || !llama_model_has_decoder(&model)) {
        unsupported(format("%s has an encoder, which the policy does not serve; use kv_policy=\"full\"", arch.c_str()));
    }
}

// Kinds of cache that a model may ask for.
void check_cache(const llama_model & model) {
    const auto & hparams = model.hparams;
    const std::string arch = model.arch_name();
    if (hparams.is_mla()) {
        unsupported(format("%s uses multi-head latent attention (MLA), whose cache has no V rows; use kv_policy=\"full\"", arch.c_str()));
    }
    switch (model.arch) {
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
            unsupported(format("%s has a sparse-attention cache of its own; use kv_policy=\"full\"", arch.c_str()));
        default:
            break;
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.swa_type != LLAMA_SWA_TYPE_STANDARD && hparams.swa_type != LLAMA_SWA_TYPE_CHUNKED) {
        unsupported(format("%s has windows that see later tokens, too; use kv_policy=\"full\"", arch.c_str()));
    }
    if (hparams.n_layer_kv_from_start >= 0) {
        unsupported(format("%s has layers that share the cache of others, which the policy does not serve yet; use kv_policy=\"full\"", arch.c_str()));
    }
    if (hparams.use_alibi) {
        unsupported(format("%s uses ALiBi position biases; use kv_policy=\"full\"", arch.c_str()));
    }
    if (hparams.n_pos_per_embd() > 1 || hparams.ple_n_heads > 0) {
        unsupported(format("%s has more than one position per token or embeds its neighbours; use kv_policy=\"full\"", arch.c_str()));
    }
}

// The types that llama.cpp's programs offer for a cache; each is in the round-trip test.
constexpr ggml_type cache_types[] = { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0,
    GGML_TYPE_IQ4_NL, GGML_TYPE_F32 };

// What flash attention on the layer's device does not take is refused here, not computed on the CPU in silence.
void check_cache_types(const settings & config, const llama_memory_params & params, uint32_t il) {
    const auto & hparams = config.model.hparams;
    for (const auto & [type, n_head_dim, name] : { std::tuple(params.type_k, hparams.n_embd_head_k(il), "K"), std::tuple(params.type_v, hparams.n_embd_head_v(il), "V") }) {
        if (std::find(std::begin(cache_types), std::end(cache_types), type) == std::end(cache_types)) {
            unsupported(format("%s is not a type for a %s cache: use f16, q8_0 or q4_0", ggml_type_name(type), name));
        }
        if (n_head_dim % uint32_t(ggml_blck_size(type)) != 0) {
            unsupported(format("%s cache type %s has blocks of %d, which do not divide the head size %u", name, ggml_type_name(type), int(ggml_blck_size(type)), n_head_dim));
        }
    }
    ggml_backend_dev_t dev = config.cparams.offload_kqv ? config.model.dev_layer(int(il)) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_init_params init = { 8*ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr holder(ggml_init(init));
    ggml_context * ctx = holder.get();
    const int64_t n_kv = POOL_PAD_CELLS;
    ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, hparams.n_head(il));
    ggml_tensor * k = ggml_new_tensor_3d(ctx, params.type_k, hparams.n_embd_head_k(il), n_kv, hparams.n_head_kv(il));
    ggml_tensor * v = ggml_new_tensor_3d(ctx, params.type_v, hparams.n_embd_head_v(il), n_kv, hparams.n_head_kv(il));
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, 1);
    ggml_tensor * op = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f);
    ggml_prec_set_acc(op, GGML_PREC_F32);
    if (dev && !ggml_backend_dev_supports_op(dev, op)) {
        unsupported(format("flash attention on %s does not take a K cache of type %s with a V cache of type %s: use f16, q8_0 or q4_0 for both",
                ggml_backend_dev_name(dev), ggml_type_name(params.type_k), ggml_type_name(params.type_v)));
    }
}

} // namespace

void check_context(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    check_model(model);
    if (!cparams.causal_attn) {
        unsupported(format("%s attends to later tokens too (encoder or diffusion model): a policy needs causal attention; use kv_policy=\"full\"", model.arch_name().c_str()));
    }
    check_cache(model);
    if (cparams.embeddings) {
        unsupported("an embedding context has nothing to freeze: drop embedding=True, or use kv_policy=\"full\"");
    }
    if (!cparams.flash_attn) {
        unsupported("flash attention is off, and then V is stored transposed: pass flash_attn=True (-fa on)");
    }
    if (params.mem_other) {
        unsupported("a context that shares another context's cells cannot have a policy; use kv_policy=\"full\"");
    }
}

cached_layers layers_with_cache(const settings & config, const llama_memory_params & params) {
    const auto & hparams = config.model.hparams;
    // layers of a draft head (NextN) are never attended by the main graph
    const bool has_draft_layers = hparams.n_layer_nextn > 0 && hparams.n_layer() > 0 && hparams.router_layer < 0;
    cached_layers found;
    for (uint32_t il = 0; il < (has_draft_layers ? hparams.n_layer() : hparams.n_layer_all); ++il) {
        if (!hparams.has_kv(il)) {
            continue;
        }
        if (hparams.n_head(il) == 0 || hparams.n_head_kv(il) == 0) {
            unsupported(format("layer %u of this %s has no attention, which the policy does not serve yet; use kv_policy=\"full\"", il, config.model.arch_name().c_str()));
        }
        check_cache_types(config, params, il);
        (hparams.is_swa(il) ? found.windowed : found.plain).push_back(il);
    }
    if (found.plain.empty()) {
        unsupported(found.windowed.empty() ? "the model has no layer with a KV cache; use kv_policy=\"full\"" :
                "all layers of the model have a sliding window: its cache is bounded as it is; use kv_policy=\"full\"");
    }
    return found;
}

attention_layer attention_of(const settings & config, uint32_t il) {
    const auto & hparams = config.model.hparams;
    ggml_backend_dev_t dev = config.cparams.offload_kqv ? config.model.dev_layer(int(il)) : nullptr;
    return { il, int64_t(hparams.n_embd_head_k(il)), int64_t(hparams.n_head(il)), int64_t(hparams.n_head_kv(il)),
        dev ? ggml_backend_dev_buffer_type(dev) : ggml_backend_cpu_buffer_type() };
}

float logit_soft_cap(const llama_model & model) { return model.hparams.attn_soft_cap ? model.hparams.f_attn_logit_softcapping : 0.0f; }

std::string fingerprint(const llama_model & model) {
    uint64_t hash = 14695981039346656037ull; // FNV-1a
    const auto add = [&](const void * data, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            hash = (hash ^ static_cast<const uint8_t *>(data)[i])*1099511628211ull;
        }
    };
    const std::string shape = format("%s %u %u", model.arch_name().c_str(), model.hparams.n_layer_all, model.hparams.n_embd);
    add(shape.data(), shape.size());
    std::vector<uint8_t> bytes;
    // by name and once each: their order, and a second copy of tied embeddings, depend on the devices
    const std::map<std::string, ggml_tensor *> tensors(model.tensors_by_name.begin(), model.tensors_by_name.end());
    for (const auto & [name, tensor] : tensors) {
        add(name.data(), name.size());
        add(&tensor->type, sizeof(tensor->type));
        if (name.find("_norm.weight") != std::string::npos && tensor->buffer) {
            bytes.resize(ggml_nbytes(tensor));
            ggml_backend_tensor_get(tensor, bytes.data(), 0, bytes.size());
            add(bytes.data(), bytes.size());
        }
    }
    return format("%s-%016llx", model.arch_name().c_str(), (unsigned long long) hash);
}

} // namespace asrkf
