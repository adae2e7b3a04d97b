// How large a pool of bytes is, and of which types: as the bytes that it was given allow, or those that the devices have free.
#pragma once

#include "llama/settings.h"

#include "llama-memory.h"

#include <map>

namespace asrkf {

struct pool_choice {
    asrkf_config        config; // with the pool in cells
    llama_memory_params params; // with the cache's types
    std::string         text;   // what was chosen and why, one line; empty where there was nothing to choose
    bool                is_less = false; // than all tokens in the types that the context came with
};

// Allocates nothing. Throws error(ASRKF_POOL_FULL) with the numbers if nothing fits.
pool_choice choose_pool(const settings & asked, const llama_memory_params & params);

// Its line, to llama.cpp's log: a warning if it is less than all. A trial says nothing.
void tell(const pool_choice & chosen, bool is_trial);

// What a context takes on one device. K, V and index are exact; compute buffers are an estimate from the graph's largest
// parts: llama.cpp reserves them after its memory is made.
struct bytes_on_device {
    uint64_t kv_bytes = 0, index_bytes = 0, compute_bytes = 0;
    uint64_t cache_bytes() const { return kv_bytes + index_bytes; }
};
using bytes_by_device = std::map<ggml_backend_dev_t, bytes_on_device>;
bytes_by_device bytes_of(const settings & config, const llama_memory_params & params);

// Bytes that can still be had on a device. ggml's CPU device gives all of the RAM; here it is what the system says is available.
uint64_t free_bytes(ggml_backend_dev_t dev);

} // namespace asrkf
