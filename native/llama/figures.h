// What can be seen: the figures of asrkf.h, read off the parts that hold them. Changes nothing.
#pragma once

#include "llama/steps.h"

#include <map>

namespace asrkf {

class figures {
public:
    figures(const settings & config, const layer_groups & groups, const token_table & tokens, const scores & scored, const prompt_cuts & cuts,
            const steps & placing, const counters & counted, const host_budget & budget)
        : config(config), groups(groups), tokens(tokens), scored(scored), cuts(cuts), placing(placing), counted(counted), budget(budget) {}

    asrkf_stats       stats(llama_context * ctx) const;
    asrkf_group_stats group_stats(uint32_t index) const;
    size_t            token_states(int32_t seq_id, uint32_t index, int32_t * out_pos, uint8_t * out_state, size_t capacity) const;
    // The record of one token, whose bytes in one group are of this size. Throws error(ASRKF_INVALID_ARGUMENT).
    uint32_t          record_at(int32_t seq_id, uint32_t index, int32_t pos, size_t size) const;
    // Those bytes; the device has finished with them.
    void              rows(uint32_t id, uint32_t index, uint8_t * out) const;
    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

private:
    void add_cut(asrkf_stats & s) const;

    const settings &     config;
    const layer_groups & groups;
    const token_table &  tokens;
    const scores &       scored;
    const prompt_cuts &  cuts;
    const steps &        placing;
    const counters &     counted;
    const host_budget &  budget;
};

} // namespace asrkf
