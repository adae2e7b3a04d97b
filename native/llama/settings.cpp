#include "llama/settings.h"

#include "policy/policy.h"

namespace asrkf {

settings::settings(const llama_model & model, const llama_cparams & cparams, const asrkf_config & config)
    : asrkf_config(config), model(model), cparams(cparams), n_seq_max(cparams.n_seq_max), n_ctx(cparams.n_ctx), n_ctx_seq(cparams.n_ctx_seq),
      n_ubatch(cparams.n_ubatch), unified(cparams.kv_unified || cparams.n_seq_max == 1), no_alloc(model.hparams.no_alloc),
      is_windowed(model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {}

uint32_t settings::index_tokens_per_row() const { return recall == RECALL_MEAN_KEY ? RECALL_BLOCK : 1; }

uint32_t settings::n_index_rows() const {
    const uint32_t n = index_tokens_per_row();
    return (n_ctx + n - 1) / n + (n > 1 ? n_seq_max - 1 : 0); // a row is of one sequence's tokens
}

// Rounding an index row costs rank, not content: the smallest type that divides a head. A mean is written many times, and
// would gather the rounding: F16.
ggml_type settings::index_type() const {
    if (index_tokens_per_row() > 1) {
        return GGML_TYPE_F16;
    }
    switch (index_kind(index)) {
        case INDEX_F16:  return GGML_TYPE_F16;
        case INDEX_Q8_0: return GGML_TYPE_Q8_0;
        case INDEX_Q4_0: return GGML_TYPE_Q4_0;
        case INDEX_AUTO: break;
    }
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        if (model.hparams.has_kv(il) && model.hparams.n_embd_head_k(il) % uint32_t(ggml_blck_size(GGML_TYPE_Q4_0)) != 0) {
            return GGML_TYPE_F16;
        }
    }
    return GGML_TYPE_Q4_0;
}

} // namespace asrkf
