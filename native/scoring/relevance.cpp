#include "scoring/relevance.h"

#include "ggml-alloc.h"

#include <algorithm>

namespace asrkf {

relevance::relevance(const std::vector<scoring_layer> & layers, uint32_t n_rows, uint32_t tokens_per_row, uint32_t n_ring_rows, ggml_type type,
        score_kind kind, float soft_cap, bool no_alloc)
    : kind(kind), soft_cap(soft_cap), specs(layers), n_rows(n_rows), tokens_per_row(tokens_per_row), n_ring_rows(n_ring_rows), by_layer(layers.size()) {
    std::vector<ggml_backend_buffer_type_t> bufts;
    for (const scoring_layer & l : specs) {
        if (l.head % ggml_blck_size(type) != 0) {
            throw error(ASRKF_UNSUPPORTED, format("index type %s has blocks of %d, which do not divide the head size %d of layer %u: use index=f16",
                    ggml_type_name(type), int(ggml_blck_size(type)), int(l.head), l.il));
        }
        if (std::find(bufts.begin(), bufts.end(), l.buft) == bufts.end()) {
            bufts.push_back(l.buft);
        }
    }
    for (ggml_backend_buffer_type_t buft : bufts) {
        ggml_init_params params = { 2*specs.size()*ggml_tensor_overhead(), nullptr, true };
        contexts.emplace_back(ggml_init(params));
        for (size_t i = 0; i < specs.size(); ++i) {
            if (specs[i].buft == buft) {
                by_layer[i].index = ggml_new_tensor_3d(contexts.back().get(), type, specs[i].head, n_rows + is_mean(), specs[i].n_head_kv); // and a row for what a step does not write
                by_layer[i].ring  = ggml_new_tensor_2d(contexts.back().get(), GGML_TYPE_F32, specs[i].head*specs[i].n_head, n_ring_rows);
            }
        }
        size_t size = ggml_backend_alloc_ctx_tensors_from_buft_size(contexts.back().get(), buft);
        if (no_alloc) { // an empty buffer keeps a scheduler from placing them itself, as llama_kv_cache does
            buffers.emplace_back(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(contexts.back().get()); t; t = ggml_get_next_tensor(contexts.back().get(), t)) {
                t->buffer = buffers.back().get();
            }
        } else {
            buffers.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(contexts.back().get(), buft));
            if (!buffers.back()) {
                throw error(ASRKF_INTERNAL, format("no %zu bytes for the index on %s: lower kv_pool, or name fewer score_layers", size, ggml_backend_buft_name(buft)));
            }
            ggml_backend_buffer_clear(buffers.back().get(), 0); // no NaN from a row that was never written
            size = ggml_backend_buffer_get_size(buffers.back().get());
        }
        sizes.emplace_back(buft, size);
        n_bytes += size;
    }
}

uint32_t relevance::n_sets() const {
    uint32_t n = 0;
    for (const scoring_layer & l : specs) {
        n = std::max(n, l.set + 1);
    }
    return n;
}

size_t relevance::n_heads() const {
    size_t n = 0;
    for (const scoring_layer & l : specs) {
        n += size_t(l.n_head);
    }
    return n;
}

int64_t relevance::most_heads() const {
    int64_t most = 0;
    for (const scoring_layer & l : specs) {
        most = std::max(most, l.n_head_kv);
    }
    return most;
}

void relevance::set_rows(size_t i, uint32_t first_row, uint32_t n, const uint8_t * keys) {
    ggml_tensor * index = by_layer[i].index;
    const size_t n_bytes = n*index->nb[1];
    for (int64_t h = 0; h < specs[i].n_head_kv; ++h) {
        ggml_backend_tensor_set(index, keys + size_t(h)*n_bytes, first_row*index->nb[1] + size_t(h)*index->nb[2], n_bytes);
    }
}

relevance::branch relevance::new_branch(ggml_context * ctx, const branch_shape & shape) const {
    const auto input = [&](ggml_tensor * t) {
        ggml_set_input(t);
        return t;
    };
    branch b;
    b.shape      = shape;
    b.rows       = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, shape.n_written));
    b.queries    = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, shape.n_kept));
    b.query_rows = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, shape.n_kept));
    if (is_mean()) {
        b.read_rows = input(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, shape.n_written, most_heads()));
        b.keep      = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, shape.n_written));
        b.weights   = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, shape.n_tokens, shape.n_written));
    }
    return b;
}

// A mean of c tokens, m of them written by this step, is (1 - m/c) of what it was and 1/c of each: exact for tokens that come
// in order. What is written again (rewalk), or follows a cut within a block, leaves the old keys a share.
relevance::written relevance::written_by(const branch_shape & shape, const index_rows & index, const std::vector<uint32_t> & records) const {
    written w;
    if (!is_mean()) {
        for (const uint32_t r : records) {
            w.rows.push_back(index[r]);
        }
        return w;
    }
    const size_t n = records.size(), n_most = shape.n_written;
    w.keep.assign(n_most, 0);
    w.weights.assign(n*n_most, 0);
    for (size_t i = 0; i < n; ++i) {
        const int64_t row = index[records[i]];
        const size_t  at  = size_t(std::find(w.rows.begin(), w.rows.end(), row) - w.rows.begin());
        if (at == n_most) {
            continue; // after cuts within blocks a rewalk may meet more of them: those keep their means
        }
        if (at == w.rows.size()) {
            w.keep[at] = 1;
            w.rows.push_back(row);
        }
        const float share = 1.0f / float(index.tokens_of(uint32_t(row)));
        w.keep[at] -= share;
        w.weights[at*n + i] = share;
    }
    w.rows.resize(n_most, n_rows);
    for (int64_t h = 0; h < most_heads(); ++h) {
        w.read_rows.insert(w.read_rows.end(), w.rows.begin(), w.rows.end());
    }
    return w;
}

void relevance::keep_means(written & w) {
    std::fill(w.keep.begin(), w.keep.end(), 1.0f);
    std::fill(w.weights.begin(), w.weights.end(), 0.0f);
}

void relevance::write_mask(const scoring_shape & shape, const std::vector<scoring_query> & queries, std::vector<float> & mask) const {
    const uint32_t n = shape.n_scored;
    mask.resize(has_mask(shape) ? n*queries.size() : 0);
    for (size_t q = 0; q < queries.size() && !mask.empty(); ++q) {
        float * seen = mask.data() + q*n;
        seen_rows & own = *queries[q].sequence;
        if (kind == SCORE_ATTENTION) {
            own.write_mask(queries[q].n_tokens, seen, n);
            seen[own.first_row()] = std::max(seen[own.first_row()], 0.0f); // also of a query that is gone: a row must not be empty
        } else {
            for (uint32_t row = 0; row < n; ++row) {
                seen[row] = own.has(row);
            }
        }
    }
}

void relevance::set_written(const branch & b, const written & w) const {
    ggml_backend_tensor_set(b.rows, w.rows.data(), 0, ggml_nbytes(b.rows));
    if (is_mean()) {
        ggml_backend_tensor_set(b.read_rows, w.read_rows.data(), 0, ggml_nbytes(b.read_rows));
        ggml_backend_tensor_set(b.keep, w.keep.data(), 0, ggml_nbytes(b.keep));
        ggml_backend_tensor_set(b.weights, w.weights.data(), 0, ggml_nbytes(b.weights));
    }
}

void relevance::build(ggml_context * ctx, ggml_cgraph * gf, const branch & b, size_t i, ggml_tensor * q, ggml_tensor * k, float kq_scale) {
    const scoring_layer & l = specs[i];
    const auto contiguous = [&](ggml_tensor * t) { return ggml_is_contiguous(t) ? t : ggml_cont(ctx, t); };
    q = contiguous(q);
    q = ggml_get_rows(ctx, ggml_reshape_2d(ctx, q, l.head*l.n_head, q->ne[2]), b.queries);
    if (is_mean()) {
        ggml_tensor * rows = b.read_rows->ne[1] == l.n_head_kv ? b.read_rows : ggml_view_2d(ctx, b.read_rows, b.shape.n_written, l.n_head_kv, b.read_rows->nb[1], 0);
        ggml_tensor * kept = ggml_mul(ctx, ggml_get_rows(ctx, by_layer[i].index, rows), b.keep);
        k = ggml_reshape_2d(ctx, contiguous(k), l.head*l.n_head_kv, b.shape.n_tokens);
        k = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, k)), b.weights);
        k = ggml_add(ctx, kept, ggml_permute(ctx, ggml_reshape_3d(ctx, k, l.head, l.n_head_kv, b.shape.n_written), 0, 2, 1, 3));
    } else {
        k = ggml_permute(ctx, k, 0, 2, 1, 3);
    }
    by_layer[i].kq_scale = kq_scale;
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, by_layer[i].index, k, b.rows));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, by_layer[i].ring, q, b.query_rows));
}

} // namespace asrkf
