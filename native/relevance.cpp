#include "relevance.h"

#include <algorithm>

namespace asrkf {

ggml_tensor * build_relevance(ggml_context * ctx, const attention_inputs & in, score_kind kind, uint32_t n_queries) {
    const int64_t n_head   = in.q->ne[1];
    const int64_t n_tokens = in.q->ne[2];
    const int64_t n_kv     = in.k->ne[2];
    const int64_t n_q      = std::min<int64_t>(n_queries, n_tokens);

    ggml_tensor * q = ggml_view_3d(ctx, in.q, in.q->ne[0], n_head, n_q, in.q->nb[1], in.q->nb[2], size_t(n_tokens - n_q)*in.q->nb[2]);
    q = ggml_permute(ctx, q, 0, 2, 1, 3);                  // [head, n_q,  n_head]
    ggml_tensor * k = ggml_permute(ctx, in.k, 0, 2, 1, 3); // [head, n_kv, n_head_kv]

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q); // [n_kv, n_q, n_head]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (kind == SCORE_MAGNITUDE) {
        kq = ggml_scale(ctx, ggml_abs(ctx, kq), in.kq_scale);
    } else {
        float scale = in.kq_scale;
        if (in.soft_cap > 0) {
            kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / in.soft_cap)), in.soft_cap);
            scale = 1;
        }
        ggml_tensor * mask = ggml_view_2d(ctx, in.kq_mask, n_kv, n_q, in.kq_mask->nb[1], size_t(n_tokens - n_q)*in.kq_mask->nb[1]);
        kq = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
    }
    // sum over queries and heads, per cell: ggml sums rows, so cells become rows
    kq = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, kq, n_kv, n_q*n_head)));
    kq = ggml_scale(ctx, ggml_sum_rows(ctx, kq), 1.0f / float(n_q*n_head));
    return ggml_reshape_1d(ctx, kq, n_kv);
}

} // namespace asrkf
