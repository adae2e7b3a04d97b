#include "llama/contexts.h"

#include "llama/refusal.h"

#include "llama-context.h"

namespace asrkf {

namespace {

class windowed_context final : public llama_kv_cache_iswa_context {
public:
    explicit windowed_context(std::unique_ptr<memory_context> context)
        : llama_kv_cache_iswa_context(LLAMA_MEMORY_STATUS_SUCCESS), whole(std::move(context)) {
        whole->asked_as = this;
    }

    bool next() override { return whole->next(); }
    bool apply() override { return whole->apply(); }
    llama_memory_status  get_status() const override { return whole->get_status(); }
    const llama_ubatch & get_ubatch() const override { return whole->get_ubatch(); }
    void on_computed(llama_context & lctx, const llm_graph_result & res) override { whole->on_computed(lctx, res); }
    const llama_kv_cache_context * get_base() const override { return whole.get(); }
    const llama_kv_cache_context * get_swa()  const override { return whole->get_group(whole->n_groups() - 1); }

    const std::unique_ptr<memory_context> whole;
};

const memory_context & whole_of(const llama_memory_context_i * mctx) {
    const auto * windowed = dynamic_cast<const windowed_context *>(mctx);
    return windowed ? *windowed->whole : static_cast<const memory_context &>(*mctx);
}

// The side branch of one graph, which is reused while its shape stays.
class side_input final : public llm_graph_input_i {
public:
    side_input(const memory_context * mctx, relevance::branch branch) : mctx(mctx), branch(std::move(branch)) {}
    void set_input(const llama_ubatch *) override { mctx->scored.set_input(mctx->side, branch); }
    bool can_reuse(const llm_graph_params & params) override {
        mctx = &whole_of(params.mctx);
        return mctx->side.shape == branch.shape;
    }

    const memory_context * mctx;
    relevance::branch      branch;
};

// The same of the queries that are kept for cuts.
class queries_input final : public llm_graph_input_i {
public:
    queries_input(const memory_context * mctx, attention_rows::branch branch) : mctx(mctx), branch(branch) {}
    void set_input(const llama_ubatch *) override {
        ggml_backend_tensor_set(branch.queries, mctx->side.for_cuts.tokens.data(), 0, ggml_nbytes(branch.queries));
        ggml_backend_tensor_set(branch.query_rows, mctx->side.for_cuts.rows.data(), 0, ggml_nbytes(branch.query_rows));
    }
    bool can_reuse(const llm_graph_params & params) override {
        mctx = &whole_of(params.mctx);
        return mctx->side.for_cuts.rows.size() == branch.n_kept;
    }

private:
    const memory_context *       mctx;
    const attention_rows::branch branch;
};

// Of own scores: which tokens of the step are the last of their sequences.
class last_tokens_input final : public llm_graph_input_i {
public:
    last_tokens_input(const memory_context * mctx, ggml_tensor * tokens) : mctx(mctx), tokens(tokens) {}
    void set_input(const llama_ubatch *) override { ggml_backend_tensor_set(tokens, mctx->side.last_tokens.data(), 0, ggml_nbytes(tokens)); }
    bool can_reuse(const llm_graph_params & params) override {
        mctx = &whole_of(params.mctx);
        return true;
    }

private:
    const memory_context * mctx;
    ggml_tensor * const    tokens;
};

} // namespace

group_context::group_context(const memory_context & whole, group & g, std::vector<llama_ubatch> ubatches)
    : llama_kv_cache_context(g.cache.get(), {}, std::move(ubatches)), whole(whole) {
    sinfos.resize(this->ubatches.size());
}

void group_context::set_slot(llama_kv_cache::slot_info slot, bool overflows) {
    sinfos[i_cur] = std::move(slot);
    n_kv          = overflows ? kv->get_size() : static_cast<const group_cache &>(*kv).n_kv(sinfos[i_cur]);
}

void group_context::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
    static_cast<const group_cache &>(*kv).write_mask(dst, *ubatch, sinfos[i_cur], causal_attn);
}

void group_context::build_side_branch(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const {
    whole.build_side_branch_of(res, gf, q, k_cur, kq_scale, il);
}

memory_context::memory_context(layer_groups & groups, steps & placing, scores & scored, prompt_cuts & cuts, steps::split_batch batch)
    : group_context(*this, groups[0], batch.ubatches), scored(scored), cuts(cuts), groups(groups), placing(placing), is_worst_case(false),
      rewalks(batch.rewalks), has_output(batch.has_output) {
    for (size_t ig = 1; ig < groups.size(); ++ig) {
        others.push_back(std::make_unique<group_context>(*this, groups[ig], batch.ubatches));
    }
}

memory_context::memory_context(layer_groups & groups, steps & placing, scores & scored, prompt_cuts & cuts)
    : group_context(*this, groups[0]), scored(scored), cuts(cuts), groups(groups), placing(placing), is_worst_case(true), rewalks(false), has_output(false) {
    for (size_t ig = 1; ig < groups.size(); ++ig) {
        others.push_back(std::make_unique<group_context>(*this, groups[ig]));
    }
}

bool memory_context::next() {
    if (look_failed) {
        return true; // so that llama.cpp applies the step once more, is refused, and takes its token back
    }
    const bool more = group_context::next();
    for (auto & other : others) {
        other->next();
    }
    return more;
}

steps::placed memory_context::place() {
    if (is_second_look) {
        return placing.place_look(ubatches[i_cur], std::move(side));
    }
    return is_rewalk() ? placing.place_rewalk(ubatches[i_cur]) : placing.place(ubatches[i_cur], i_cur == 0, is_before_rewalk());
}

bool memory_context::apply() {
    if (look_failed) {
        return false;
    }
    try {
        steps::placed step = place();
        side = std::move(step.side);
        for (uint32_t ig = 0; ig < n_groups(); ++ig) {
            group_context & context = ig == 0 ? *this : *others[ig - 1];
            const bool overflows = placing.overflows(groups[ig], step.slots[ig]);
            context.set_slot(std::move(step.slots[ig]), overflows);
        }
        return true;
    } catch (const std::exception & e) {
        refuse(e);
        return false;
    }
}

void memory_context::on_computed(llama_context & lctx, const llm_graph_result & res) {
    if (!is_second_look && wants_look(lctx, res)) {
        return look_again(lctx);
    }
    scored.run(side.scoring);
    scored.gated.queue(side.records);
    const bool is_last = i_cur + 1 == ubatches.size();
    placing.computed(lctx, res, ubatches[i_cur], is_last, is_last && has_output);
}

// Without memory to tell, it does not; what was computed is good.
bool memory_context::wants_look(llama_context & lctx, const llm_graph_result & res) {
    try {
        return placing.wants_look(lctx, res, ubatches[i_cur], side);
    } catch (const std::exception & e) {
        refuse(e);
        scored.drop_pending();
        return false;
    }
}

// llama.cpp reads a step's results when on_computed() has returned, from the graph that is computed again here: it never sees
// those of the first time. (The heads of drafts, whose graphs are of another type, have no memory of ours.)
void memory_context::look_again(llama_context & lctx) {
    is_second_look = true;
    ggml_status status = GGML_STATUS_FAILED;
    look_failed    = !lctx.process_ubatch(ubatches[i_cur], LLM_GRAPH_TYPE_DEFAULT, asked_as, status);
    is_second_look = false;
}

void memory_context::build_side_branch_of(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const {
    groups[groups.of_layer(uint32_t(il))].cache->note_rotation(uint32_t(il), k_cur);
    build_scores(res, gf, q, k_cur, kq_scale, il);
    build_queries(res, gf, q, kq_scale, il);
    build_own_scores(res, gf, q, kq_scale, il);
    scored.gated.build(res.get_ctx(), gf, il, q);
}

void memory_context::build_scores(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const {
    const int i = scored.place_of(il);
    if (i < 0) {
        return;
    }
    if (i == 0) { // a new graph
        const branch_shape shape = is_worst_case ? scored.worst_shape(uint32_t(k_cur->ne[2])) : side.shape;
        auto input = std::make_unique<side_input>(this, scored.new_branch(res.get_ctx(), shape));
        scored.building = &input->branch;
        res.add_input(std::move(input));
    }
    scored.build(res.get_ctx(), gf, i, q, k_cur, kq_scale);
}

void memory_context::build_queries(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int32_t il) const {
    const int i = cuts.place_of(il);
    if (i < 0) {
        return;
    }
    if (i == 0) { // a new graph
        cuts.building = cuts.new_branch(res.get_ctx(), is_worst_case ? cuts.worst_kept(uint32_t(q->ne[2])) : uint32_t(side.for_cuts.rows.size()));
        res.add_input(std::make_unique<queries_input>(this, cuts.building));
    }
    cuts.build(res.get_ctx(), gf, i, q, kq_scale);
}

void memory_context::build_own_scores(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int32_t il) const {
    own_scores & own = scored.own;
    const int i = own.place_of(il);
    if (i < 0) {
        return;
    }
    if (i == 0) { // a new graph
        own.last_tokens = own.new_input(res.get_ctx());
        if (own.last_tokens) {
            res.add_input(std::make_unique<last_tokens_input>(this, own.last_tokens));
        }
    }
    own.build(res.get_ctx(), gf, i, q, kq_scale);
}

llama_memory_context_ptr as_asked(std::unique_ptr<memory_context> context, bool is_windowed) {
    return is_windowed ? llama_memory_context_ptr(std::make_unique<windowed_context>(std::move(context))) : std::move(context);
}

uint32_t graph_nodes_of(const layer_groups & groups, const scores & scored, const prompt_cuts & cuts) {
    constexpr uint32_t A_GROUP = 16, A_SCORING_LAYER = 48, A_GATE = 64, A_QUERY = 8;
    uint32_t n = A_GROUP*uint32_t(groups.size());
    for (const group & g : groups) {
        for (const uint32_t il : g.layers) {
            n += (scored.place_of(int32_t(il)) >= 0 ? A_SCORING_LAYER : 0) + (scored.gated.is_on() ? A_GATE : 0)
                + (scored.own.place_of(int32_t(il)) >= 0 ? A_QUERY : 0) + (cuts.place_of(int32_t(il)) >= 0 ? A_QUERY : 0);
        }
    }
    return n;
}

} // namespace asrkf
