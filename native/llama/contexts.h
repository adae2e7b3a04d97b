// What llama.cpp's graph code sees of the memory for one batch: a context for each layer group, the first of which is the
// whole's and holds the others.
#pragma once

#include "llama/steps.h"

#include "llama-kv-cache-iswa.h"

namespace asrkf {

class memory_context;

// What the graph code sees of one group for the current step.
class group_context : public llama_kv_cache_context {
public:
    group_context(const memory_context & whole, group & g, std::vector<llama_ubatch> ubatches);
    group_context(const memory_context & whole, group & g) : llama_kv_cache_context(g.cache.get()), whole(whole) {} // the worst case

    void set_slot(llama_kv_cache::slot_info slot, bool overflows); // found when the step is placed
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const override;
    void build_side_branch(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const override;

protected:
    const memory_context & whole;
};

class memory_context final : public group_context {
public:
    memory_context(layer_groups & groups, steps & placing, scores & scored, prompt_cuts & cuts, steps::split_batch batch);
    memory_context(layer_groups & groups, steps & placing, scores & scored, prompt_cuts & cuts); // worst case, for reserving compute buffers

    bool next() override;
    bool apply() override;
    void on_computed(llama_context & lctx, const llm_graph_result & res) override;

    uint32_t n_groups() const override { return 1 + uint32_t(others.size()); }
    uint32_t group_of(int32_t il) const override { return groups.of_layer(uint32_t(il)); }
    const llama_kv_cache_context * get_group(uint32_t ig) const override { return ig == 0 ? this : others[ig - 1].get(); }

    void build_side_branch_of(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const;

    side_step     side;    // of the current step
    scores &      scored;
    prompt_cuts & cuts;
    llama_memory_context_i * asked_as = this; // what llama.cpp's graphs were given

private:
    void build_scores(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k_cur, float kq_scale, int32_t il) const;
    void build_queries(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int32_t il) const;
    void build_own_scores(llm_graph_result & res, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int32_t il) const;
    bool is_rewalk() const { return rewalks && i_cur + 1 == ubatches.size(); } // the last tokens of a prompt, computed again
    bool is_before_rewalk() const { return rewalks && i_cur + 2 == ubatches.size(); }
    steps::placed place();
    bool wants_look(llama_context & lctx, const llm_graph_result & res);
    void look_again(llama_context & lctx);

    layer_groups & groups;
    steps &        placing;
    const bool     is_worst_case;
    const bool     rewalks;
    const bool     has_output;
    bool           is_second_look = false; // the step is being computed again
    bool           look_failed    = false;
    std::vector<std::unique_ptr<group_context>> others;
};

// As llama.cpp's graphs ask for it. Those of models with sliding windows want two caches. The first stands for all groups; the
// second, the last group, is asked only where there is but one.
llama_memory_context_ptr as_asked(std::unique_ptr<memory_context> context, bool is_windowed);

// More than groups and side branches add to a graph: a node takes a few hundred bytes, and with one too few ggml aborts.
uint32_t graph_nodes_of(const layer_groups & groups, const scores & scored, const prompt_cuts & cuts);

} // namespace asrkf
