// How a new context is laid out: which layers share a set of cells, how many each has, which layers score; and its memory.
#pragma once

#include "llama/groups.h"

#include "llama-memory.h"

namespace asrkf {

struct layout {
    std::vector<group>    groups;
    std::vector<uint32_t> group_of_layer;
    std::vector<uint32_t> scoring_layers; // one ranking serves all groups; empty where the policy asks for no scores
};

// Is the pool a mean over layers that have whole units of cells each? Then it need be no multiple of a unit.
bool     has_mean_pool(const settings & config);
// Cells that a pool must have at least.
uint32_t least_pool(const settings & config);

// Allocates nothing. Throws error if the configuration does not fit the model or the context.
layout make_layout(const settings & config, const llama_memory_params & params);

// The groups' caches, their mover and host stores. Returns where scores are read back to: memory of the host, pinned where the
// device offers it.
ggml_backend_buffer_type_t allocate(layer_groups & groups, const settings & config, const llama_memory_params & params, host_budget & budget);

} // namespace asrkf
