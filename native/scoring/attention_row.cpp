#include "scoring/attention_row.h"

#include "scoring/by_device.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace asrkf {

namespace {

constexpr size_t MOST_NODES = 16;

ggml_context_ptr new_context(size_t n_tensors) {
    ggml_context_ptr made(ggml_init({ n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(MOST_NODES, false), nullptr, true }));
    if (!made) {
        throw error(ASRKF_INTERNAL, "no memory for a graph of attention");
    }
    return made;
}

} // namespace

struct attention_rows::part {
    ggml_backend_buffer_type_t buft;
    ggml_backend_t             backend = nullptr;
    ggml_context_ptr           holder;   // of the rings
    ggml_backend_buffer_ptr    rings;
    size_t                     n_ring_bytes = 0;
    ggml_gallocr_ptr           room;
    size_t                     n_room_bytes = 0;
    std::vector<size_t>        layers;
};

// Products of one query with the keys of a piece: of the pool by cell, or (keys null) of what is uploaded.
struct attention_rows::graph {
    graph(const row_layer & l, ggml_tensor * ring, ggml_tensor * keys);

    ggml_context_ptr holder = new_context(MOST_NODES);
    ggml_cgraph *    nodes  = ggml_new_graph_custom(holder.get(), MOST_NODES, false);
    ggml_tensor *    query;              // I32 [1]: row of the ring
    ggml_tensor *    rows;               // I32 [piece]: of keys
    ggml_tensor *    uploaded = nullptr; // [elements, piece]
    ggml_tensor *    products;           // F32 [piece, n_head]
};

attention_rows::graph::graph(const row_layer & l, ggml_tensor * ring, ggml_tensor * keys) {
    ggml_context * ctx = holder.get();
    query = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    rows  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ROW_PIECE_TOKENS);
    if (keys) {
        keys = ggml_view_2d(ctx, keys, keys->ne[0], keys->ne[1]*keys->ne[2], keys->nb[1], 0);
    } else {
        keys = uploaded = ggml_new_tensor_2d(ctx, l.type, l.head*l.n_head_kv, ROW_PIECE_TOKENS);
        ggml_set_input(uploaded);
    }
    ggml_set_input(query);
    ggml_set_input(rows);
    // the operation that takes rows of every cache type to F32 on every device
    ggml_tensor * k = ggml_reshape_3d(ctx, ggml_get_rows(ctx, keys, rows), l.head, l.n_head_kv, ROW_PIECE_TOKENS);
    ggml_tensor * q = ggml_reshape_3d(ctx, ggml_get_rows(ctx, ring, query), l.head, l.n_head / l.n_head_kv, l.n_head_kv);
    products = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_permute(ctx, k, 0, 2, 1, 3)), q);
    ggml_prec_set_acc(products, GGML_PREC_F32);
    ggml_set_output(products);
    ggml_build_forward_expand(nodes, products);
}

//
// creation
//

attention_rows::attention_rows(std::vector<row_layer> layers, uint32_t n_ring_rows, float soft_cap, bool no_alloc)
    : specs(std::move(layers)), soft_cap(soft_cap), states(specs.size()) {
    for (size_t i = 0; i < specs.size(); ++i) {
        states[i].on = &part_of(parts, specs[i].buft);
        states[i].on->layers.push_back(i);
    }
    for (auto & p : parts) {
        allocate_ring(*p, n_ring_rows, no_alloc);
        reserve(*p, no_alloc);
    }
}

attention_rows::~attention_rows() = default;

void attention_rows::allocate_ring(part & p, uint32_t n_ring_rows, bool no_alloc) {
    p.holder = new_context(p.layers.size());
    for (const size_t i : p.layers) {
        states[i].ring = ggml_new_tensor_2d(p.holder.get(), GGML_TYPE_F32, specs[i].head*specs[i].n_head, n_ring_rows);
    }
    p.n_ring_bytes = ggml_backend_alloc_ctx_tensors_from_buft_size(p.holder.get(), p.buft);
    if (no_alloc) { // an empty buffer keeps a scheduler from placing them itself, as llama_kv_cache does
        p.rings.reset(ggml_backend_buft_alloc_buffer(p.buft, 0));
        for (const size_t i : p.layers) {
            states[i].ring->buffer = p.rings.get();
        }
        return;
    }
    p.rings.reset(ggml_backend_alloc_ctx_tensors_from_buft(p.holder.get(), p.buft));
    if (!p.rings) {
        throw error(ASRKF_INTERNAL, format("no %zu bytes for the newest queries on %s: lower rows or kv_pool", p.n_ring_bytes, ggml_backend_buft_name(p.buft)));
    }
    p.n_ring_bytes = ggml_backend_buffer_get_size(p.rings.get());
}

// For uploaded keys: those of the pool need less.
void attention_rows::reserve(part & p, bool no_alloc) {
    p.room.reset(ggml_gallocr_new(p.buft));
    size_t largest = p.layers[0];
    for (const size_t i : p.layers) {
        graph g(specs[i], states[i].ring, nullptr);
        for (int n = 0; n < ggml_graph_n_nodes(g.nodes); ++n) {
            ggml_tensor * node = ggml_graph_node(g.nodes, n);
            if (!ggml_backend_dev_supports_op(device_of(p.buft), node)) {
                throw error(ASRKF_UNSUPPORTED, format("%s lacks %s of %s, which cuts are measured with: use another type for K (-ctk f16), or another kv_policy",
                        ggml_backend_dev_name(device_of(p.buft)), ggml_op_desc(node), ggml_type_name(node->src[0]->type)));
            }
        }
        size_t n_bytes = 0;
        ggml_gallocr_reserve_n_size(p.room.get(), g.nodes, nullptr, nullptr, &n_bytes);
        if (n_bytes > p.n_room_bytes) {
            p.n_room_bytes = n_bytes;
            largest = i;
        }
    }
    if (!no_alloc) {
        if (!ggml_gallocr_reserve(p.room.get(), graph(specs[largest], states[largest].ring, nullptr).nodes)) {
            throw error(ASRKF_INTERNAL, format("no %zu bytes on %s to measure cuts in: lower kv_pool", p.n_room_bytes, ggml_backend_buft_name(p.buft)));
        }
        p.n_room_bytes = ggml_gallocr_get_buffer_size(p.room.get(), 0);
    }
}

attention_rows::sizes attention_rows::ring_bytes() const {
    sizes found;
    for (const auto & p : parts) {
        found.emplace_back(p->buft, p->n_ring_bytes);
    }
    return found;
}

attention_rows::sizes attention_rows::room_bytes() const {
    sizes found;
    for (const auto & p : parts) {
        found.emplace_back(p->buft, p->n_room_bytes);
    }
    return found;
}

//
// in the model's graph
//

attention_rows::branch attention_rows::new_branch(ggml_context * ctx, uint32_t n_kept) const {
    const branch b = { n_kept, ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_kept), ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_kept) };
    ggml_set_input(b.queries);
    ggml_set_input(b.query_rows);
    return b;
}

void attention_rows::build(ggml_context * ctx, ggml_cgraph * gf, const branch & b, size_t i, ggml_tensor * q, float kq_scale) {
    q = ggml_is_contiguous(q) ? q : ggml_cont(ctx, q);
    q = ggml_get_rows(ctx, ggml_reshape_2d(ctx, q, specs[i].head*specs[i].n_head, q->ne[2]), b.queries);
    states[i].kq_scale = kq_scale;
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, states[i].ring, q, b.query_rows));
}

//
// beside it
//

void attention_rows::attach(const std::vector<ggml_backend_t> & backends) {
    for (auto & p : parts) {
        p->backend = backend_of(p->buft, backends);
    }
}

bool attention_rows::is_attached() const { return std::all_of(parts.begin(), parts.end(), [](const auto & p) { return p->backend != nullptr; }); }

void attention_rows::probabilities(size_t i, int32_t query, ggml_tensor * keys, const std::vector<key_place> & tokens, std::vector<float> & out) {
    std::vector<uint32_t> on_device, on_host;
    for (uint32_t t = 0; t < tokens.size(); ++t) {
        (tokens[t].row >= 0 ? on_device : on_host).push_back(t);
    }
    out.resize(size_t(specs[i].n_head)*tokens.size());
    multiply(i, query, keys, tokens, on_device, out);
    multiply(i, query, nullptr, tokens, on_host, out);
    soften(i, uint32_t(tokens.size()), out);
}

// Those of `which` tokens, that are all on the device, or (keys null) all on the host.
void attention_rows::multiply(size_t i, int32_t query, ggml_tensor * keys, const std::vector<key_place> & tokens, const std::vector<uint32_t> & which, std::vector<float> & out) {
    if (which.empty()) {
        return;
    }
    part & p = *states[i].on;
    const graph g(specs[i], states[i].ring, keys);
    if (!ggml_gallocr_alloc_graph(p.room.get(), g.nodes)) {
        throw error(ASRKF_INTERNAL, "no memory to measure a cut in");
    }
    const size_t row_bytes = ggml_row_size(specs[i].type, specs[i].head*specs[i].n_head_kv);
    std::vector<uint8_t> upload(keys ? 0 : ROW_PIECE_TOKENS*row_bytes, 0);
    std::vector<int32_t> rows(ROW_PIECE_TOKENS);
    std::vector<float>   products(size_t(ggml_nelements(g.products)));
    for (size_t first = 0; first < which.size(); first += ROW_PIECE_TOKENS) {
        const size_t n = std::min<size_t>(ROW_PIECE_TOKENS, which.size() - first);
        for (size_t k = 0; k < ROW_PIECE_TOKENS; ++k) { // past the last token: the piece's first again
            const key_place & at = tokens[which[first + (k < n ? k : 0)]];
            rows[k] = keys ? at.row : int32_t(k);
            if (!keys) {
                std::memcpy(upload.data() + k*row_bytes, at.host, row_bytes);
            }
        }
        ggml_backend_tensor_set(g.query, &query, 0, sizeof(query));
        ggml_backend_tensor_set(g.rows, rows.data(), 0, ggml_nbytes(g.rows));
        if (!keys) {
            ggml_backend_tensor_set(g.uploaded, upload.data(), 0, upload.size());
        }
        if (ggml_backend_graph_compute(p.backend, g.nodes) != GGML_STATUS_SUCCESS) {
            throw error(ASRKF_INTERNAL, format("%s failed to measure a cut", ggml_backend_name(p.backend)));
        }
        ggml_backend_tensor_get(g.products, products.data(), 0, ggml_nbytes(g.products));
        for (size_t h = 0; h < size_t(specs[i].n_head); ++h) {
            for (size_t k = 0; k < n; ++k) {
                out[h*tokens.size() + which[first + k]] = products[h*ROW_PIECE_TOKENS + k];
            }
        }
    }
}

void attention_rows::soften(size_t i, uint32_t n_tokens, std::vector<float> & logits) const {
    const float scale = states[i].kq_scale;
    const std::vector<float> & sinks = specs[i].sink_logits;
    for (size_t h = 0; h < size_t(specs[i].n_head); ++h) {
        float * row = logits.data() + h*n_tokens, most = sinks.empty() ? -INFINITY : sinks[h];
        for (uint32_t t = 0; t < n_tokens; ++t) {
            row[t] = soft_cap > 0 ? soft_cap*std::tanh(row[t]*scale / soft_cap) : row[t]*scale;
            most   = std::max(most, row[t]);
        }
        double sum = sinks.empty() ? 0 : std::exp(double(sinks[h] - most));
        for (uint32_t t = 0; t < n_tokens; ++t) {
            row[t] = std::exp(row[t] - most);
            sum += double(row[t]);
        }
        for (uint32_t t = 0; t < n_tokens; ++t) {
            row[t] = float(double(row[t]) / sum);
        }
    }
}

} // namespace asrkf
