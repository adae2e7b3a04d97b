#include "scoring/gates.h"

#include "scoring/by_device.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <cmath>

namespace asrkf {

struct gates::part {
    ggml_backend_buffer_type_t buft;
    ggml_backend_t             backend = nullptr;
    ggml_context_ptr           holder;
    ggml_backend_buffer_ptr    buffer;
    size_t                     n_bytes = 0;
    ggml_tensor *              scores  = nullptr; // F32 [n_heads, n_tokens_most]: of a step, written by its graph
    ggml_backend_buffer_ptr    arrived;           // the same on the host
    size_t                     n_heads = 0;
};

//
// creation
//

gates::gates(const gate_file & file, std::vector<gated_layer> layers, uint32_t n_tokens_most, ggml_backend_buffer_type_t host, bool no_alloc)
    : specs(std::move(layers)), dim(file.dim), norm_eps(file.norm_eps), states(specs.size()) {
    for (size_t i = 0; i < specs.size(); ++i) {
        check(file, i);
        states[i].on = &part_of(parts, specs[i].buft);
        states[i].first_head = states[i].on->n_heads;
        states[i].on->n_heads += size_t(specs[i].n_head_kv);
    }
    for (auto & p : parts) {
        p->holder.reset(ggml_init({ (7*specs.size() + 1)*ggml_tensor_overhead(), nullptr, true }));
        if (!p->holder) {
            throw error(ASRKF_INTERNAL, "no memory for the gates");
        }
        p->scores = ggml_new_tensor_2d(p->holder.get(), GGML_TYPE_F32, int64_t(p->n_heads), n_tokens_most);
    }
    std::vector<std::pair<ggml_tensor *, const ggml_tensor *>> copies;
    for (size_t i = 0; i < specs.size(); ++i) {
        const gate_tensors & from = file.tensors[size_t(std::lower_bound(file.layers.begin(), file.layers.end(), specs[i].il) - file.layers.begin())];
        const auto like = [&](const ggml_tensor * t) {
            copies.emplace_back(ggml_dup_tensor(states[i].on->holder.get(), t), t);
            return copies.back().first;
        };
        states[i].weights = { like(from.q_weight), like(from.q_bias), like(from.k_weight), like(from.q_norm), like(from.k_norm), like(from.sinks), like(from.bias) };
    }
    for (auto & p : parts) {
        p->n_bytes = ggml_backend_alloc_ctx_tensors_from_buft_size(p->holder.get(), p->buft);
        check_operations(*p);
        if (no_alloc) { // an empty buffer keeps a scheduler from placing them itself, as llama_kv_cache does
            p->buffer.reset(ggml_backend_buft_alloc_buffer(p->buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(p->holder.get()); t; t = ggml_get_next_tensor(p->holder.get(), t)) {
                t->buffer = p->buffer.get();
            }
            continue;
        }
        p->buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(p->holder.get(), p->buft));
        p->arrived.reset(ggml_backend_buft_alloc_buffer(host, ggml_nbytes(p->scores)));
        if (!p->buffer || !p->arrived) {
            throw error(ASRKF_INTERNAL, format("no %zu bytes for the gates on %s: lower kv_pool", p->n_bytes, ggml_backend_buft_name(p->buft)));
        }
        p->n_bytes = ggml_backend_buffer_get_size(p->buffer.get());
    }
    for (const auto & [to, from] : copies) {
        if (!no_alloc) {
            ggml_backend_tensor_set(to, from->data, 0, ggml_nbytes(from));
        }
    }
}

gates::~gates() = default;

void gates::check(const gate_file & file, size_t i) const {
    const gated_layer & l = specs[i];
    const auto at = std::lower_bound(file.layers.begin(), file.layers.end(), l.il);
    if (at == file.layers.end() || *at != l.il) {
        throw error(ASRKF_INVALID_ARGUMENT, format("gates=%s has no gates of layer %u: make gates of this model with asrkf gates train MODEL", file.path.c_str(), l.il));
    }
    const gate_tensors & g = file.tensors[size_t(at - file.layers.begin())];
    if (g.q_weight->ne[0] != l.n_embd || g.bias->ne[0]*g.bias->ne[1] != l.n_head || g.bias->ne[1] != l.n_head_kv) {
        throw error(ASRKF_INVALID_ARGUMENT, format("gates=%s: layer %u is for %d elements, %d heads and %d KV heads, the model has %d, %d and %d", file.path.c_str(), l.il,
                int(g.q_weight->ne[0]), int(g.bias->ne[0]*g.bias->ne[1]), int(g.bias->ne[1]), int(l.n_embd), int(l.n_head), int(l.n_head_kv)));
    }
}

// Else the scheduler would compute them on the CPU in silence.
void gates::check_operations(part & p) {
    ggml_context_ptr holder(ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead_custom(64, false), nullptr, true }));
    const size_t i = size_t(std::find_if(states.begin(), states.end(), [&](const state & s) { return s.on == &p; }) - states.begin());
    ggml_cgraph * gf = ggml_new_graph_custom(holder.get(), 64, false);
    build(holder.get(), gf, i, ggml_new_tensor_2d(holder.get(), GGML_TYPE_F32, specs[i].n_embd, 1));
    for (int n = 0; n < ggml_graph_n_nodes(gf); ++n) {
        ggml_tensor * node = ggml_graph_node(gf, n);
        if (!ggml_backend_dev_supports_op(device_of(p.buft), node)) {
            throw error(ASRKF_UNSUPPORTED, format("%s lacks %s, which gates are computed with: use another kv_policy", ggml_backend_dev_name(device_of(p.buft)), ggml_op_desc(node)));
        }
    }
}

gates::sizes gates::breakdown() const {
    sizes result;
    for (const auto & p : parts) {
        result.emplace_back(p->buft, p->n_bytes);
    }
    return result;
}

//
// a step
//

// [n_head_kv, n_tokens]
ggml_tensor * gates::build_scores(ggml_context * ctx, const state & s, ggml_tensor * x) const {
    const gate_tensors & w = s.weights;
    const int64_t n = x->ne[1], n_group = w.bias->ne[0], n_head_kv = w.bias->ne[1];
    const float scale = 1.0f / std::sqrt(float(dim));
    ggml_tensor * q = ggml_add(ctx, ggml_mul_mat(ctx, w.q_weight, x), w.q_bias);
    q = ggml_mul(ctx, ggml_rms_norm(ctx, ggml_reshape_4d(ctx, q, dim, n_group, n_head_kv, n), norm_eps), w.q_norm);
    ggml_tensor * k = ggml_reshape_4d(ctx, ggml_mul_mat(ctx, w.k_weight, x), dim, 1, n_head_kv, n);
    k = ggml_mul(ctx, ggml_rms_norm(ctx, k, norm_eps), w.k_norm);
    ggml_tensor * own = ggml_scale(ctx, ggml_sum_rows(ctx, ggml_mul(ctx, q, k)), scale); // [1, n_group, n_head_kv, n]
    own = ggml_add(ctx, own, ggml_reshape_4d(ctx, w.bias, 1, n_group, n_head_kv, 1));
    ggml_tensor * sinks = ggml_mul_mat(ctx, w.sinks, q);
    ggml_prec_set_acc(sinks, GGML_PREC_F32);
    ggml_tensor * p = ggml_soft_max(ctx, ggml_concat(ctx, own, ggml_scale(ctx, sinks, scale), 0)); // [1 + n_sinks, n_group, n_head_kv, n]
    p = ggml_cont(ctx, ggml_view_4d(ctx, p, 1, n_group, n_head_kv, n, p->nb[1], p->nb[2], p->nb[3], 0));
    return ggml_reshape_2d(ctx, ggml_mean(ctx, ggml_reshape_3d(ctx, p, n_group, n_head_kv, n)), n_head_kv, n);
}

void gates::build(ggml_context * ctx, ggml_cgraph * gf, size_t i, ggml_tensor * x) {
    const state & s = states[i];
    ggml_tensor * to = s.on->scores;
    ggml_tensor * column = ggml_view_2d(ctx, to, specs[i].n_head_kv, x->ne[1], to->nb[1], s.first_head*to->nb[0]);
    ggml_build_forward_expand(gf, ggml_cpy(ctx, build_scores(ctx, s, x), column));
}

void gates::attach(const std::vector<ggml_backend_t> & backends) {
    for (auto & p : parts) {
        p->backend = backend_of(p->buft, backends);
    }
}

bool gates::is_attached() const { return std::all_of(parts.begin(), parts.end(), [](const auto & p) { return p->backend != nullptr; }); }

void gates::read(uint32_t n_tokens) {
    for (auto & p : parts) {
        ggml_backend_tensor_get_async(p->backend, p->scores, ggml_backend_buffer_get_base(p->arrived.get()), 0, n_tokens*p->scores->nb[1]);
    }
}

void gates::wait() {
    for (auto & p : parts) {
        ggml_backend_synchronize(p->backend);
    }
}

float gates::score(size_t i, uint32_t token) const {
    const state & s = states[i];
    const auto * row = static_cast<const float *>(ggml_backend_buffer_get_base(s.on->arrived.get())) + token*s.on->n_heads + s.first_head;
    return *std::max_element(row, row + specs[i].n_head_kv);
}

} // namespace asrkf
