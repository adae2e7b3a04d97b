// The memory that freezes: what the C boundary (asrkf.cpp) sees of it. Needs no header of llama.cpp.
#pragma once

#include "common.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

struct llama_context;
struct llama_model;

namespace asrkf {

class engine {
public:
    virtual ~engine() = default;

    virtual uint64_t freeze_range (llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) = 0;
    virtual uint64_t restore_range(llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1) = 0;
    virtual void     pin_range    (llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, bool pinned) = 0;

    virtual void     set_prompt_follows(bool follows) = 0;
    virtual void     set_host_limit(uint64_t limit_bytes) = 0;

    virtual asrkf_config      get_config() const = 0;
    virtual const std::string & get_pool_choice() const = 0; // what was chosen for the pool and why; "" if it was asked for
    virtual asrkf_stats       get_stats(llama_context * ctx) const = 0;
    virtual asrkf_group_stats get_group_stats(uint32_t group) const = 0;
    virtual size_t get_tokens(int32_t seq_id, uint32_t group, int32_t * out_pos, uint8_t * out_state, size_t capacity) const = 0;
    virtual std::vector<std::pair<int32_t, int32_t>> get_pinned(int32_t seq_id) const = 0; // [begin, end), ascending
    virtual void   get_rows(llama_context * ctx, int32_t seq_id, uint32_t group, int32_t pos, uint8_t * out, size_t size) = 0;
    // Of an output row that a backend sampler took; false if none was read. Throws error(ASRKF_INTERNAL) if the device failed.
    virtual bool   get_sampled_output(int32_t i, asrkf_output & out) = 0;

    virtual void     set_trace(asrkf_step * buffer, size_t capacity) = 0;
    virtual uint64_t get_trace_count() const = 0;
};

// The engine of a context; nullptr if it runs upstream's cache.
engine * engine_of(llama_context * ctx);

// The same figures for a context that runs upstream's cache: every cell is active.
asrkf_stats upstream_stats(llama_context * ctx);

// An output row of the last llama_decode(); throws as asrkf_output_entropy() says.
asrkf_output output_of(llama_context * ctx, int32_t i);

// By device, of any context.
std::vector<asrkf_device_memory> device_memory(llama_context * ctx);
// Bytes that pool=auto takes devices to have, in trials of this thread; 0: what they say.
void pretend_free(uint64_t bytes);

// What a calibration side file names its model by.
std::string model_fingerprint(const llama_model * model);

// Settings for the next context of this thread; nullptr takes them back.
void set_next_config(const asrkf_config * config);
// While it is on, contexts of this thread are not the user's: they get upstream's cache and consume no settings.
void set_own_context(bool on);

// Sensitivities of a model's layers, measured in one pass over tokens, and who scores, by depth (native/llama/one_pass.h says what
// is thrown). progress: asrkf.h.
struct measured_layers {
    std::vector<double>   sensitivities; // of the layers with a cache and no sliding window, > 0
    std::vector<uint32_t> score_layers;  // ascending
};
measured_layers measure_layers(llama_model & model, const std::vector<int32_t> & tokens, int32_t n_threads, const std::function<bool(size_t, size_t)> & progress);

// Makes a side file for a model that has none, and names it; "": there is none to be had. Of the contexts of this thread; null takes it
// back. It may throw, and then the context is refused.
using calibrator = std::function<std::string(llama_model &)>;
void set_next_calibrator(const calibrator & next);

// Where the engine looks for the side files of this model.
std::string model_calibration_file(const llama_model * model);
std::string model_gates_file(const llama_model * model);

// Text and status of the last failure on this thread.
void         set_last_error(const std::string & text, asrkf_status status);
const char * get_last_error();
asrkf_status get_last_status();

} // namespace asrkf
