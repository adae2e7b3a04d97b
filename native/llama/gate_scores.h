// Scores of `kvzip`: each token's, in each layer group, from the gates of its layers. The step that computes a token computes them;
// they are folded into the policies before the next decision, as other scores are.
#pragma once

#include "llama/transfers.h"
#include "scoring/gates.h"

#include <string>

namespace asrkf {

// Gates of the layers of these groups (made, or planned), from the file that `gates=` names, or the model's own in the cache folder. Null where
// the policy does not go by gates or nothing can be frozen; and in a trial of a model without memory, which cannot tell what model it
// is, if no file is named. Throws error(ASRKF_INVALID_ARGUMENT) where there is no file, or one of another model, and as gates do.
template <typename Groups> std::unique_ptr<gates> make_gates(const settings & config, const Groups & groups, ggml_backend_buffer_type_t host, bool no_alloc);

class gate_scores {
public:
    // Where the policy goes by gates; else nothing is allocated. host: where scores are read to. Throws as gates do.
    gate_scores(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, ggml_backend_buffer_type_t host);

    bool is_on() const { return computing != nullptr; }
    // q: the layer's queries, from which the graph leads to what they are made of.
    void build(ggml_context * ctx, ggml_cgraph * gf, int32_t il, ggml_tensor * q);
    // The step's graph has been queued: its scores, of these records. llama.cpp calls this where nothing may throw.
    void queue(const std::vector<uint32_t> & records);
    // What has come, into the policies. A token that is gone by now is left out.
    void fold_in();
    void drop_pending() { pending.clear(); }

    size_t device_bytes() const;
    gates::sizes breakdown() const { return computing ? computing->breakdown() : gates::sizes(); }

private:
    struct scored_token { uint32_t record; llama_pos pos; llama_token token; };

    layer_groups &                groups;
    token_table &                 tokens;
    transfers &                   moves;
    const bool                    no_alloc;
    std::unique_ptr<gates>        computing; // see make_gates()
    std::vector<scored_token>     pending;   // by token of the step
};

} // namespace asrkf
