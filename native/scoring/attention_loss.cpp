#include "scoring/attention_loss.h"

#include <algorithm>
#include <cstring>

namespace asrkf {

namespace {

constexpr size_t MOST_NODES = 128;

float flash_parameter(const ggml_tensor * attention, size_t i) { // scale, bias of ALiBi, soft cap
    float value;
    std::memcpy(&value, reinterpret_cast<const char *>(attention->op_params) + i*sizeof(float), sizeof(float));
    return value;
}

ggml_context_ptr new_context() {
    ggml_context_ptr made(ggml_init({ MOST_NODES*ggml_tensor_overhead() + ggml_graph_overhead_custom(MOST_NODES, false), nullptr, true }));
    if (!made) {
        throw error(ASRKF_INTERNAL, "no memory for a graph of the calibration");
    }
    return made;
}

// The same bytes without the way they were made, which would otherwise be computed again.
ggml_tensor * leaf(ggml_context * ctx, const ggml_tensor * t) {
    ggml_tensor * made = ggml_new_tensor(ctx, t->type, GGML_MAX_DIMS, t->ne);
    std::copy_n(t->nb, GGML_MAX_DIMS, made->nb);
    made->data   = t->data;
    made->buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return made;
}

ggml_tensor * apply(ggml_context * ctx, const output_path & path, ggml_tensor * t) {
    for (const output_path::step & step : path.steps) {
        auto * weights = const_cast<ggml_tensor *>(step.weights);
        switch (step.op) {
            case GGML_OP_RMS_NORM: t = ggml_rms_norm(ctx, t, step.value); break;
            case GGML_OP_NORM:     t = ggml_norm(ctx, t, step.value); break;
            case GGML_OP_SCALE:    t = ggml_scale(ctx, t, step.value); break;
            case GGML_OP_MUL:      t = ggml_mul(ctx, t, weights); break;
            case GGML_OP_ADD:      t = ggml_add(ctx, t, weights); break;
            default: throw error(ASRKF_INTERNAL, format("a step %s of an attention's output", ggml_op_name(step.op)));
        }
    }
    return t;
}

} // namespace

void attention_loss::compute(ggml_cgraph * graph) const {
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw error(ASRKF_INTERNAL, format("%s failed to compute a graph of the calibration", ggml_backend_name(backend)));
    }
}

void attention_loss::probabilities(ggml_backend_t on, ggml_tensor * of, int64_t from, int64_t n, std::vector<float> & out) {
    if (on != backend) {
        first_memory.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(on)));
        second_memory.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(on)));
        backend = on;
    }
    attention = of;
    first     = from;
    holder    = new_context();
    ggml_context * ctx   = holder.get();
    ggml_cgraph *  graph = ggml_new_graph_custom(ctx, MOST_NODES, false);
    ggml_tensor * q = leaf(ctx, of->src[0]), * k = leaf(ctx, of->src[1]), * mask = leaf(ctx, of->src[3]);
    const float scale = flash_parameter(of, 0), soft_cap = flash_parameter(of, 2);

    ggml_tensor * kq = ggml_mul_mat(ctx, k, ggml_view_3d(ctx, q, q->ne[0], n, q->ne[2], q->nb[1], q->nb[2], size_t(from)*q->nb[1]));
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (soft_cap != 0) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / soft_cap)), soft_cap);
    }
    probability = ggml_soft_max_ext(ctx, kq, ggml_view_2d(ctx, mask, mask->ne[0], n, mask->nb[1], size_t(from)*mask->nb[1]), soft_cap != 0 ? 1.0f : scale, 0.0f);
    ggml_soft_max_add_sinks(probability, of->src[4] ? leaf(ctx, of->src[4]) : nullptr);
    ggml_set_output(probability);
    const int64_t n_cells = k->ne[1], n_heads = q->ne[2], n_chunks = n / CALIBRATION_CHUNK_TOKENS;
    // [cells, chunk, chunks, heads] -> [chunk, heads, chunks, cells]: what is summed over comes first
    ggml_tensor * sorted = ggml_cont(ctx, ggml_permute(ctx, ggml_reshape_4d(ctx, probability, n_cells, CALIBRATION_CHUNK_TOKENS, n_chunks, n_heads), 3, 0, 2, 1));
    ggml_tensor * mean = ggml_scale(ctx, ggml_sum_rows(ctx, ggml_reshape_2d(ctx, sorted, CALIBRATION_CHUNK_TOKENS*n_heads, n_chunks*n_cells)),
            1.0f / float(CALIBRATION_CHUNK_TOKENS*n_heads));
    mean = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, mean, n_chunks, n_cells)));
    ggml_set_output(mean);
    ggml_build_forward_expand(graph, mean);
    if (!ggml_gallocr_alloc_graph(first_memory.get(), graph)) {
        throw error(ASRKF_INTERNAL, "no memory for the attention of the calibration");
    }
    compute(graph);
    out.resize(size_t(n_chunks*n_cells));
    ggml_backend_tensor_get(mean, out.data(), 0, ggml_nbytes(mean));
}

void attention_loss::losses(const std::vector<float> & kept, const output_path & path, const ggml_tensor * input, std::vector<float> & out) {
    ggml_context_ptr own = new_context();
    ggml_context * ctx   = own.get();
    ggml_cgraph *  graph = ggml_new_graph_custom(ctx, MOST_NODES, false);
    const int64_t n_cells = probability->ne[0], n = probability->ne[1], n_heads = probability->ne[2], n_chunks = n / CALIBRATION_CHUNK_TOKENS;

    ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_cells, 1, n_chunks, 1);
    ggml_set_input(mask);
    ggml_tensor * all  = ggml_reshape_4d(ctx, leaf(ctx, probability), n_cells, CALIBRATION_CHUNK_TOKENS, n_chunks, n_heads);
    ggml_tensor * part = ggml_mul(ctx, all, mask);
    ggml_tensor * sum  = ggml_sum_rows(ctx, part);
    if (attention->src[4]) { // a sink takes its share of both
        sum = ggml_sub(ctx, sum, ggml_scale_bias(ctx, ggml_sum_rows(ctx, all), 1.0f, -1.0f));
    }
    part = ggml_div(ctx, part, ggml_scale_bias(ctx, sum, 1.0f, 1e-20f));
    ggml_tensor * change = ggml_reshape_3d(ctx, ggml_sub(ctx, part, all), n_cells, n, n_heads);

    ggml_tensor * v = ggml_cont(ctx, ggml_transpose(ctx, leaf(ctx, attention->src[2])));
    ggml_tensor * lost = ggml_cont(ctx, ggml_permute(ctx, ggml_mul_mat(ctx, v, change), 0, 2, 1, 3)); // [head, heads, n]
    ggml_tensor * y = ggml_view_2d(ctx, leaf(ctx, attention), lost->ne[0]*lost->ne[1], n, attention->nb[2], size_t(first)*attention->nb[2]);
    y    = ggml_mul_mat(ctx, path.matrix, y);
    lost = ggml_mul_mat(ctx, path.matrix, ggml_reshape_2d(ctx, lost, lost->ne[0]*lost->ne[1], n));
    ggml_tensor * added = apply(ctx, path, y);
    lost = path.steps.empty() ? lost : ggml_sub(ctx, apply(ctx, path, ggml_add(ctx, y, lost)), added);
    ggml_tensor * before = ggml_view_2d(ctx, leaf(ctx, input), input->ne[0], n, input->nb[1], size_t(first)*input->nb[1]);
    const auto squared_norm = [&](ggml_tensor * t) { return ggml_sum_rows(ctx, ggml_sqr(ctx, t)); };
    ggml_tensor * norms = ggml_concat(ctx, squared_norm(lost), squared_norm(ggml_add(ctx, before, added)), 0);
    ggml_set_output(norms);
    ggml_build_forward_expand(graph, norms);
    if (!ggml_gallocr_alloc_graph(second_memory.get(), graph)) {
        throw error(ASRKF_INTERNAL, "no memory for the losses of the calibration");
    }
    ggml_backend_tensor_set(mask, kept.data(), 0, ggml_nbytes(mask));
    compute(graph);
    std::vector<float> values(size_t(2*n));
    ggml_backend_tensor_get(norms, values.data(), 0, ggml_nbytes(norms));
    out.insert(out.end(), values.begin(), values.end());
}

} // namespace asrkf
