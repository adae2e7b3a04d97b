// The attention of the kept queries over the whole index: a graph of its own, so that the model's graph has the same shape
// whether a step scores or not. Knows ggml only.
//
// Each device with scoring layers has its part: the layers whose index it holds. A part is queued on the backend that the
// model's graph ran on there, behind that graph, and its scores come back in the same order. So it reads the rows and
// queries of the step, the next step writes none of them before it is done, and the step's logits wait for it: a second
// stream for each device, on which it would overlap with sampling, is a later matter. Never through llama.cpp's scheduler,
// which computes the graph that it has allocated, whatever it is given.
//
// It also tells what attention misses: of each head of each scoring layer, the probability that falls on frozen tokens.
//
// A graph is made for each size of the index, of which there are four to an octave, and the newest few are kept with their
// addresses. They share one buffer for each device, which is reserved for the largest when this is created.
#pragma once

#include "scoring/relevance.h"

#include <list>

namespace asrkf {

// For tests: the n-th run of this thread from now on fails; 0: none.
extern thread_local uint32_t fail_scoring_in;

class scoring_graphs {
public:
    // What a run reads, which must stay until the backends are synchronised.
    struct inputs {
        std::vector<int32_t> scoring; // rows of the rings that score
        std::vector<float>   mask;    // as relevance::mask_of() has it
        std::vector<float>   frozen;  // [n_scored, n_sets]: part of a row's tokens that is; empty for magnitudes, which are no probabilities
    };

    // largest: shapes that all others are parts of. no_alloc: sizes only. Throws error(ASRKF_UNSUPPORTED) where a device lacks
    // an operation, error(ASRKF_INTERNAL) without memory.
    scoring_graphs(const relevance & kept, const std::vector<scoring_shape> & largest, bool no_alloc);
    ~scoring_graphs();

    size_t n_parts() const { return parts.size(); }
    size_t device_bytes() const;
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> breakdown() const;

    // Rows that are scored where so many are used.
    uint32_t size_class(uint32_t n_used) const;

    // The backends that compute the model's graphs. They must outlive every run, not this object.
    void attach(const std::vector<ggml_backend_t> & backends);
    bool is_attached() const;
    // Make this shape's graphs unless they are kept. Throws error(ASRKF_INTERNAL) without memory.
    void prepare(const scoring_shape & shape);
    // Queue what was prepared last, and its way back: to out each part's means, then its peaks, n_scored of each; to
    // out_missed what each head misses. They must stay as the inputs do. False if a device failed: both are then undefined.
    bool run(const inputs & in, float * out, float * out_missed);

    std::vector<ggml_cgraph *> graphs() const; // for tests: those that were prepared last, one for each part

private:
    struct graph; // of one part and shape
    struct part;  // a device's scoring layers

    void reserve(part & p, const std::vector<scoring_shape> & largest, bool no_alloc);
    void check_ops(const part & p, const graph & g) const;

    const relevance &                  kept;
    std::vector<std::unique_ptr<part>> parts;
};

} // namespace asrkf
