#include "scoring/own_attention.h"

#include "scoring/by_device.h"
#include "scoring/fold.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <map>

namespace asrkf {

namespace {

constexpr size_t NODES_A_LAYER = 64;

size_t sum_of_cells(const std::map<uint32_t, uint32_t> & sets) {
    size_t sum = 0;
    for (const auto & [set, n_cells] : sets) {
        sum += n_cells;
    }
    return sum;
}

} // namespace

struct own_attention::part {
    ggml_backend_buffer_type_t   buft;
    ggml_backend_t               backend = nullptr;
    ggml_context_ptr             holder;  // of the newest queries, and of what is found
    ggml_backend_buffer_ptr      memory;
    ggml_tensor *                out           = nullptr; // F32 [cells of all sets]
    size_t                       n_kept_bytes  = 0;
    ggml_gallocr_ptr             room;
    size_t                       n_room_bytes = 0;
    std::vector<size_t>          layers;
    std::map<uint32_t, uint32_t> sets;    // of these layers: cells
    std::unique_ptr<graph>       newest;
    std::vector<float>           mask, copy; // of a run: what it reads, and `out`
};

struct own_attention::graph {
    graph(const own_attention & kept, const part & p, const std::vector<ggml_tensor *> & keys, uint32_t n_asking);

    const uint32_t       n_asking;
    std::vector<uint8_t> meta; // memory of the tensors: ggml's own would abort where there is none
    ggml_context_ptr     holder;
    ggml_cgraph *        nodes;
    ggml_tensor *        seqs = nullptr; // I32 [n_asking]: rows of the queries; null with one sequence
    ggml_tensor *        mask;           // F32 [cells of all sets * n_asking]

private:
    ggml_tensor * of_layer(const own_attention & kept, size_t i, ggml_tensor * keys, ggml_tensor * seen) const;
};

own_attention::graph::graph(const own_attention & kept, const part & p, const std::vector<ggml_tensor *> & keys, uint32_t n_asking) : n_asking(n_asking) {
    const size_t n_most = 8 + p.layers.size()*NODES_A_LAYER;
    meta.resize(n_most*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_most, false));
    holder.reset(ggml_init({ meta.size(), meta.data(), true }));
    ggml_context * ctx = holder.get();
    nodes = ggml_new_graph_custom(ctx, n_most, false);
    if (kept.n_seqs > 1) {
        seqs = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_asking);
        ggml_set_input(seqs);
    }
    mask = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, int64_t(sum_of_cells(p.sets)*n_asking));
    ggml_set_input(mask);
    size_t first = 0;
    for (const auto & [set, n_cells] : p.sets) {
        ggml_tensor * seen = ggml_view_2d(ctx, mask, n_cells, n_asking, n_cells*sizeof(float), first*n_asking*sizeof(float));
        ggml_tensor * sum  = nullptr;
        for (const size_t i : p.layers) {
            if (kept.specs[i].set == set) {
                ggml_tensor * of_one = of_layer(kept, i, keys[i], seen);
                sum = sum ? ggml_add(ctx, sum, of_one) : of_one;
                ggml_build_forward_expand(nodes, sum);
            }
        }
        ggml_build_forward_expand(nodes, ggml_cpy(ctx, sum, ggml_view_1d(ctx, p.out, n_cells, first*sizeof(float))));
        first += n_cells;
    }
}

// [cells]
ggml_tensor * own_attention::graph::of_layer(const own_attention & kept, size_t i, ggml_tensor * keys, ggml_tensor * seen) const {
    ggml_context * ctx = holder.get();
    const own_layer & l = kept.specs[i];
    const float scale = kept.kq_scales[i];
    ggml_tensor * q = seqs ? ggml_get_rows(ctx, kept.queries[i], seqs) : kept.queries[i];
    // the queries of all heads that share a key head in one contiguous matrix: the CPU's fast product asks for that
    if (n_asking > 1) {
        q = ggml_cont(ctx, ggml_view_3d(ctx, q, l.head, n_asking, l.n_head, q->nb[1], size_t(l.head)*sizeof(float), 0));
    }
    q = ggml_reshape_3d(ctx, q, l.head, n_asking*(l.n_head/l.n_head_kv), l.n_head_kv);
    ggml_tensor * k  = ggml_view_3d(ctx, keys, l.head, l.n_cells, l.n_head_kv, keys->nb[1], ggml_row_size(l.type, l.head), 0);
    ggml_tensor * kq = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, k, q), l.n_cells, n_asking, l.n_head);
    if (kept.soft_cap > 0) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / kept.soft_cap)), kept.soft_cap);
    }
    ggml_tensor * probabilities = ggml_soft_max_ext(ctx, kq, seen, kept.soft_cap > 0 ? 1.0f : scale, 0.0f);
    ggml_tensor * sum = fold(ctx, ggml_reshape_2d(ctx, probabilities, l.n_cells, n_asking*l.n_head), false);
    return ggml_scale(ctx, sum, kept.weight(i) / float(n_asking));
}

//
// creation
//

own_attention::own_attention(std::vector<own_layer> layers, uint32_t n_seqs, float soft_cap, bool no_alloc)
    : specs(std::move(layers)), n_seqs(n_seqs), soft_cap(soft_cap), queries(specs.size()), kq_scales(specs.size(), 1.0f) {
    for (size_t i = 0; i < specs.size(); ++i) {
        part & p = part_of(parts, specs[i].buft);
        p.layers.push_back(i);
        p.sets[specs[i].set] = specs[i].n_cells;
        found.resize(std::max<size_t>(found.size(), specs[i].set + 1));
        found[specs[i].set].resize(specs[i].n_cells);
    }
    for (auto & p : parts) {
        allocate(*p, no_alloc);
        reserve(*p, no_alloc);
    }
}

own_attention::~own_attention() = default;

float own_attention::weight(size_t i) const {
    const auto n_layers = std::count_if(specs.begin(), specs.end(), [&](const own_layer & l) { return l.set == specs[i].set; });
    return 1.0f / float(n_layers*specs[i].n_head);
}

void own_attention::allocate(part & p, bool no_alloc) {
    p.holder.reset(ggml_init({ (p.layers.size() + 1)*ggml_tensor_overhead(), nullptr, true }));
    if (!p.holder) {
        throw error(ASRKF_INTERNAL, "no memory for the newest queries");
    }
    for (const size_t i : p.layers) {
        queries[i] = ggml_new_tensor_2d(p.holder.get(), GGML_TYPE_F32, specs[i].head*specs[i].n_head, n_seqs);
    }
    p.out = ggml_new_tensor_1d(p.holder.get(), GGML_TYPE_F32, int64_t(sum_of_cells(p.sets)));
    p.n_kept_bytes = ggml_backend_alloc_ctx_tensors_from_buft_size(p.holder.get(), p.buft);
    if (no_alloc) { // an empty buffer keeps a scheduler from placing them itself, as llama_kv_cache does
        p.memory.reset(ggml_backend_buft_alloc_buffer(p.buft, 0));
        for (const size_t i : p.layers) {
            queries[i]->buffer = p.memory.get();
        }
        p.out->buffer = p.memory.get();
        return;
    }
    p.memory.reset(ggml_backend_alloc_ctx_tensors_from_buft(p.holder.get(), p.buft));
    if (!p.memory) {
        throw error(ASRKF_INTERNAL, format("no %zu bytes for the newest queries on %s: lower kv_pool", p.n_kept_bytes, ggml_backend_buft_name(p.buft)));
    }
    p.n_kept_bytes = ggml_backend_buffer_get_size(p.memory.get());
}

// For all sequences at once, with tensors in place of the keys.
void own_attention::reserve(part & p, bool no_alloc) {
    ggml_context_ptr stand_ins(ggml_init({ specs.size()*ggml_tensor_overhead(), nullptr, true }));
    std::vector<ggml_tensor *> as_keys(specs.size(), nullptr);
    for (const size_t i : p.layers) {
        as_keys[i] = ggml_new_tensor_2d(stand_ins.get(), specs[i].type, specs[i].head*specs[i].n_head_kv, specs[i].n_cells);
        as_keys[i]->buffer = p.memory.get();
    }
    const graph g(*this, p, as_keys, n_seqs);
    for (int n = 0; n < ggml_graph_n_nodes(g.nodes); ++n) {
        ggml_tensor * node = ggml_graph_node(g.nodes, n);
        if (!ggml_backend_dev_supports_op(device_of(p.buft), node)) {
            throw error(ASRKF_UNSUPPORTED, format("%s lacks %s of %s", ggml_backend_dev_name(device_of(p.buft)), ggml_op_desc(node),
                    ggml_type_name(node->src[0]->type)));
        }
    }
    p.room.reset(ggml_gallocr_new(p.buft));
    ggml_gallocr_reserve_n_size(p.room.get(), g.nodes, nullptr, nullptr, &p.n_room_bytes);
    if (!no_alloc) {
        if (!ggml_gallocr_reserve(p.room.get(), g.nodes)) {
            throw error(ASRKF_INTERNAL, format("no %zu bytes on %s for the attention of all layers: lower kv_pool, or set ranking=shared", p.n_room_bytes,
                    ggml_backend_buft_name(p.buft)));
        }
        p.n_room_bytes = ggml_gallocr_get_buffer_size(p.room.get(), 0);
    }
}

own_attention::sizes own_attention::kept_bytes() const {
    sizes all;
    for (const auto & p : parts) {
        all.emplace_back(p->buft, p->n_kept_bytes - ggml_nbytes(p->out));
    }
    return all;
}

own_attention::sizes own_attention::room_bytes() const {
    sizes all;
    for (const auto & p : parts) {
        all.emplace_back(p->buft, p->n_room_bytes + ggml_nbytes(p->out));
    }
    return all;
}

//
// in the model's graph
//

ggml_tensor * own_attention::new_input(ggml_context * ctx) const {
    if (n_seqs == 1) {
        return nullptr;
    }
    ggml_tensor * last_tokens = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_seqs);
    ggml_set_input(last_tokens);
    return last_tokens;
}

void own_attention::build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * last_tokens, size_t i, ggml_tensor * q, float kq_scale) {
    kq_scales[i] = kq_scale;
    q = ggml_is_contiguous(q) ? q : ggml_cont(ctx, q);
    q = ggml_reshape_2d(ctx, q, specs[i].head*specs[i].n_head, q->ne[2]);
    q = last_tokens ? ggml_get_rows(ctx, q, last_tokens) : ggml_view_2d(ctx, q, q->ne[0], 1, q->nb[1], size_t(q->ne[1] - 1)*q->nb[1]);
    ggml_build_forward_expand(gf, ggml_cpy(ctx, q, queries[i]));
}

//
// beside it
//

void own_attention::attach(const std::vector<ggml_backend_t> & backends, std::vector<ggml_tensor *> keys) {
    for (auto & p : parts) {
        p->backend = backend_of(p->buft, backends);
    }
    this->keys = std::move(keys);
}

void own_attention::prepare(uint32_t n_asking) {
    for (auto & p : parts) {
        if (!p->newest || p->newest->n_asking != n_asking) {
            p->newest.reset(); // never computed in room that another has now
            auto made = std::make_unique<graph>(*this, *p, keys, n_asking);
            if (!ggml_gallocr_alloc_graph(p->room.get(), made->nodes)) {
                throw error(ASRKF_INTERNAL, format("the attention of %u sequences does not fit the room on %s", n_asking, ggml_backend_buft_name(p->buft)));
            }
            p->newest = std::move(made);
        }
        p->mask.resize(size_t(ggml_nelements(p->newest->mask)));
        p->copy.resize(size_t(ggml_nelements(p->out)));
    }
}

void own_attention::run(const inputs & in) {
    is_running = true; // also what fails in the middle
    for (auto & p : parts) {
        const graph & g = *p->newest;
        auto to = p->mask.begin();
        for (const auto & [set, n_cells] : p->sets) {
            to = std::copy(in.masks[set].begin(), in.masks[set].end(), to);
        }
        if (g.seqs) {
            ggml_backend_tensor_set_async(p->backend, g.seqs, in.seqs.data(), 0, ggml_nbytes(g.seqs));
        }
        ggml_backend_tensor_set_async(p->backend, g.mask, p->mask.data(), 0, ggml_nbytes(g.mask));
        if (ggml_backend_graph_compute_async(p->backend, g.nodes) != GGML_STATUS_SUCCESS) {
            throw error(ASRKF_INTERNAL, format("%s failed to compute a graph", ggml_backend_name(p->backend)));
        }
        ggml_backend_tensor_get_async(p->backend, p->out, p->copy.data(), 0, ggml_nbytes(p->out));
    }
}

void own_attention::settle() {
    for (auto & p : parts) {
        if (is_running) {
            ggml_backend_synchronize(p->backend);
        }
    }
    is_running = false;
}

void own_attention::wait() {
    settle();
    for (std::vector<float> & of_one : found) {
        std::fill(of_one.begin(), of_one.end(), 0.0f);
    }
    for (auto & p : parts) {
        const float * from = p->copy.data();
        for (const auto & [set, n_cells] : p->sets) { // a set's layers may be on several devices
            for (uint32_t cell = 0; cell < n_cells; ++cell) {
                found[set][cell] += *from++;
            }
        }
    }
}

} // namespace asrkf
