#include "scoring/scoring_graph.h"

#include "scoring/fold.h"

#include "ggml-alloc.h"

#include <algorithm>

namespace asrkf {

namespace {

constexpr uint32_t QUERIES_AT_ONCE = 8; // their products with the whole index lie in memory together
constexpr size_t   KEPT_GRAPHS     = 4;

} // namespace

struct scoring_graphs::graph {
    graph(const relevance & kept, const std::vector<size_t> & layers, const scoring_shape & shape);

    const scoring_shape  shape;
    std::vector<uint8_t> meta; // memory of the tensors: ggml's own would abort where there is none
    ggml_context_ptr     holder;
    ggml_cgraph *       nodes   = nullptr;
    ggml_tensor *       scoring = nullptr; // I32 [n_scoring]: rows of the rings that score
    ggml_tensor *       mask    = nullptr; // F32 [n_scored, n_scoring]: log of the tokens that the row stands for; for magnitudes 0 or 1
    ggml_tensor *       frozen  = nullptr; // F32 [n_scored, n_sets]
    ggml_tensor *       mean    = nullptr; // F32 [n_scored]: averaged over queries, heads and all scoring layers; of this part's layers
    ggml_tensor *       peak    = nullptr; // F32 [n_scored]: highest of all heads of these layers; averaged over queries, at a prompt's end the highest
    ggml_tensor *       missed  = nullptr; // F32 [heads of these layers]: probability of frozen tokens, averaged over queries

private:
    void add_layer(const relevance & kept, size_t i);
    ggml_tensor * scores_of(const relevance & kept, size_t i, ggml_tensor * queries, uint32_t first, uint32_t n) const;
};

//
// a graph
//

scoring_graphs::graph::graph(const relevance & kept, const std::vector<size_t> & layers, const scoring_shape & shape) : shape(shape) {
    const size_t n_chunks = (shape.n_scoring + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE;
    const size_t n_most   = 8 + layers.size()*(160 + 64*n_chunks);
    meta.resize(n_most*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_most, false));
    ggml_init_params params = { meta.size(), meta.data(), true };
    holder.reset(ggml_init(params));
    ggml_context * ctx = holder.get();
    nodes = ggml_new_graph_custom(ctx, n_most, false);
    scoring = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, shape.n_scoring);
    ggml_set_input(scoring);
    if (kept.has_mask(shape)) {
        mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, shape.n_scored, shape.n_scoring);
        ggml_set_input(mask);
    }
    if (kept.kind == SCORE_ATTENTION) {
        frozen = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, shape.n_scored, kept.n_sets());
        ggml_set_input(frozen);
    }
    for (const size_t i : layers) {
        add_layer(kept, i);
    }
    for (ggml_tensor * out : { mean, peak, missed }) {
        if (out) {
            ggml_build_forward_expand(nodes, out);
            ggml_set_output(out);
        }
    }
}

// [n_scored, n, n_head]: what n of the queries that score make of the index rows.
ggml_tensor * scoring_graphs::graph::scores_of(const relevance & kept, size_t i, ggml_tensor * queries, uint32_t first, uint32_t n) const {
    ggml_context * ctx = holder.get();
    const scoring_layer & l = kept.layers()[i];
    const float kq_scale = kept.states()[i].kq_scale;
    ggml_tensor * index = kept.states()[i].index;
    ggml_tensor * keys = ggml_view_3d(ctx, index, l.head, shape.n_scored, l.n_head_kv, index->nb[1], index->nb[2], 0);
    // the queries of all heads that share a key head in one contiguous matrix: the CPU's fast product asks for that
    ggml_tensor * q = ggml_view_3d(ctx, queries, l.head, n, l.n_head, queries->nb[1], size_t(l.head)*sizeof(float), first*queries->nb[1]);
    q = ggml_reshape_3d(ctx, ggml_cont(ctx, q), l.head, n*(l.n_head/l.n_head_kv), l.n_head_kv);
    ggml_tensor * kq = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, keys, q), shape.n_scored, n, l.n_head);
    ggml_tensor * seen = mask ? ggml_view_2d(ctx, mask, shape.n_scored, n, mask->nb[1], first*mask->nb[1]) : nullptr;
    if (kept.kind == SCORE_MAGNITUDE) {
        kq = ggml_scale(ctx, ggml_abs(ctx, kq), kq_scale);
        return seen ? ggml_mul(ctx, kq, seen) : kq;
    }
    if (kept.soft_cap > 0) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, kq_scale / kept.soft_cap)), kept.soft_cap);
    }
    return ggml_soft_max_ext(ctx, kq, seen, kept.soft_cap > 0 ? 1.0f : kq_scale, 0.0f);
}

void scoring_graphs::graph::add_layer(const relevance & kept, size_t i) {
    ggml_context * ctx = holder.get();
    const int64_t n_head = kept.layers()[i].n_head, n = shape.n_scored;
    ggml_tensor * queries = ggml_get_rows(ctx, kept.states()[i].ring, scoring);
    ggml_tensor * sums = nullptr, * tops = nullptr; // over the queries, [n_scored, 1, n_head]
    for (uint32_t first = 0; first < shape.n_scoring; first += QUERIES_AT_ONCE) {
        ggml_tensor * some = scores_of(kept, i, queries, first, std::min(QUERIES_AT_ONCE, shape.n_scoring - first));
        ggml_tensor * sum  = fold(ctx, some, false);
        sums = sums ? ggml_add(ctx, sums, sum) : sum;
        if (shape.prompt_end) {
            ggml_tensor * top = fold(ctx, some, true);
            tops = tops ? joined(ctx, tops, top, true) : top;
            ggml_build_forward_expand(nodes, tops);
        }
        ggml_build_forward_expand(nodes, sums); // here, so that the next queries find this room free
    }
    const auto by_head = [&](ggml_tensor * t) { return ggml_reshape_2d(ctx, ggml_is_contiguous(t) ? t : ggml_cont(ctx, t), n, n_head); };
    ggml_tensor * heads = by_head(sums);
    // at a prompt's end any word of a question may be the one that asks; over steps a head that asks for long: what a single
    // query asks for would bounce
    ggml_tensor * top  = shape.prompt_end ? fold(ctx, by_head(tops), true) : ggml_scale(ctx, fold(ctx, heads, true), 1.0f / float(shape.n_scoring));
    ggml_tensor * part = ggml_scale(ctx, fold(ctx, heads, false), 1.0f / float(shape.n_scoring*n_head*int64_t(kept.layers().size())));
    mean = mean ? ggml_add(ctx, mean, part) : part;
    peak = peak ? joined(ctx, peak, top, true) : top;
    ggml_build_forward_expand(nodes, mean);
    ggml_build_forward_expand(nodes, peak);
    if (frozen) {
        ggml_tensor * column = ggml_view_1d(ctx, frozen, n, kept.layers()[i].set*frozen->nb[1]);
        ggml_tensor * on_frozen = ggml_scale(ctx, ggml_reshape_1d(ctx, ggml_mul_mat(ctx, heads, column), n_head), 1.0f / float(shape.n_scoring));
        missed = missed ? ggml_concat(ctx, missed, on_frozen, 0) : on_frozen;
        ggml_build_forward_expand(nodes, missed);
    }
}

//
// all of them
//

scoring_graphs::scoring_graphs(const device_part & part) : part(part), room(ggml_gallocr_new(part.buft)) { reserve(); }

scoring_graphs::~scoring_graphs() = default;

// A smaller graph may fit its room worse: each is tried.
void scoring_graphs::reserve() {
    const relevance & kept = *part.kept;
    scoring_shape needs_most;
    for (scoring_shape shape : part.largest) {
        shape.n_scored = 0;
        while (shape.n_scored < kept.rows()) {
            shape.n_scored = rows_to_score(shape.n_scored + 1, kept.rows());
            graph g(kept, part.layers, shape);
            check_ops(g);
            size_t n_needed = 0;
            ggml_gallocr_reserve_n_size(room.get(), g.nodes, nullptr, nullptr, &n_needed);
            if (n_needed > n_bytes) {
                n_bytes    = n_needed;
                needs_most = shape;
            }
        }
    }
    if (!part.no_alloc) {
        if (!ggml_gallocr_reserve(room.get(), graph(kept, part.layers, needs_most).nodes)) {
            throw error(ASRKF_INTERNAL, format("no %zu bytes on %s to compute scores in: lower n_ctx, or name fewer score_layers", n_bytes,
                    ggml_backend_buft_name(part.buft)));
        }
        n_bytes = ggml_gallocr_get_buffer_size(room.get(), 0);
    }
}

// Here, not when a scheduler would compute elsewhere what a device cannot, and carry the index there.
void scoring_graphs::check_ops(const graph & g) const {
    for (int i = 0; i < ggml_graph_n_nodes(g.nodes); ++i) {
        ggml_tensor * node = ggml_graph_node(g.nodes, i);
        if (!ggml_backend_dev_supports_op(part.device, node)) {
            throw error(ASRKF_UNSUPPORTED, format("%s lacks %s of %s, which scores are computed with: use index=f16, or kv_policy=\"window\"",
                    ggml_backend_dev_name(part.device), ggml_op_desc(node), ggml_type_name(node->src[0]->type)));
        }
    }
}

void scoring_graphs::prepare(const scoring_shape & shape) {
    const auto found = std::find_if(graphs.begin(), graphs.end(), [&](const graph & g) { return g.shape == shape; });
    if (found != graphs.end()) {
        graphs.splice(graphs.begin(), graphs, found);
        return;
    }
    graphs.emplace_front(*part.kept, part.layers, shape);
    const bool   made   = ggml_gallocr_alloc_graph(room.get(), graphs.front().nodes);
    const size_t n_room = ggml_gallocr_get_buffer_size(room.get(), 0);
    if (!made || n_room != n_bytes) {
        graphs.clear(); // never computed in room that is gone
        n_bytes = n_room;
        throw error(ASRKF_INTERNAL, format("scoring %u rows does not fit the room that was reserved on %s", shape.n_scored, ggml_backend_buft_name(part.buft)));
    }
    while (graphs.size() > KEPT_GRAPHS) {
        graphs.pop_back();
    }
}

void scoring_graphs::run(const scoring_inputs & in, float * out, float * out_missed) {
    const graph & g = graphs.front();
    ggml_backend_tensor_set_async(backend, g.scoring, in.scoring.data(), 0, ggml_nbytes(g.scoring));
    for (const auto & [tensor, values] : { std::pair(g.mask, &in.mask), std::pair(g.frozen, &in.frozen) }) {
        if (tensor) {
            ggml_backend_tensor_set_async(backend, tensor, values->data(), 0, ggml_nbytes(tensor));
        }
    }
    if (ggml_backend_graph_compute_async(backend, g.nodes) != GGML_STATUS_SUCCESS) {
        throw error(ASRKF_INTERNAL, format("%s failed to compute a graph", ggml_backend_name(backend)));
    }
    ggml_backend_tensor_get_async(backend, g.mean, out, 0, ggml_nbytes(g.mean));
    ggml_backend_tensor_get_async(backend, g.peak, out + g.mean->ne[0], 0, ggml_nbytes(g.peak));
    if (g.missed) {
        ggml_backend_tensor_get_async(backend, g.missed, out_missed, 0, ggml_nbytes(g.missed));
    }
}

void scoring_graphs::wait() {
    if (backend) {
        ggml_backend_synchronize(backend);
    }
}

ggml_cgraph * scoring_graphs::newest() const { return graphs.front().nodes; }

} // namespace asrkf
