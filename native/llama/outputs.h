// The logits of the last llama_decode(), where the host has them.
#pragma once

#include <cstdint>
#include <vector>

struct llama_context;
struct llama_ubatch;
class llm_graph_result;

namespace asrkf {

// A backend sampler leaves an output's logits on the device, in memory that the next step uses again; what then lies on the
// host is an earlier step's. Fetched here, for what is decided after a call: the last such row of each sequence.
class sampled_rows {
public:
    explicit sampled_rows(uint32_t n_seq_max) : rows(n_seq_max) {}

    // After each step, queued as the logits are.
    void fetch(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch);
    // Once the step has finished: nullptr if none was fetched since the last clear().
    const float * of(uint32_t seq) const { return rows[seq].fetched ? rows[seq].logits.data() : nullptr; }
    void clear();

private:
    struct row { std::vector<float> logits; bool fetched = false; };
    std::vector<row> rows; // by sequence
};

// Does a backend sampler take any of the step's outputs?
bool goes_to_sampler(const llm_graph_result & res);
// Of the step's first output row, which nobody has read yet: waits for it.
double first_entropy(llama_context & ctx, const llm_graph_result & res);

} // namespace asrkf
