// The portable scorer: a graph of ggml's operations, apart from the model's graph, which so has the same shape whether a step
// scores or not. Knows ggml only.
//
// It is queued on the backend that the model's graph ran on, behind that graph, and its scores come back in the same order. So
// it reads the rows and queries of the step, the next step writes none of them before it is done, and the step's logits wait
// for it. Never through llama.cpp's scheduler, which computes the graph that it has allocated, whatever it is given.
//
// A graph is made for each size of the index, of which there are four to an octave, and the newest few are kept with their
// addresses. They share one buffer, which is reserved for the largest when this is created.
#pragma once

#include "scoring/device_scorer.h"

#include <list>

namespace asrkf {

class scoring_graphs final : public device_scorer {
public:
    // Throws error(ASRKF_UNSUPPORTED) where the device lacks an operation, error(ASRKF_INTERNAL) without memory.
    explicit scoring_graphs(const device_part & part);
    ~scoring_graphs() override;

    const char * kind() const override { return "graph"; }
    size_t device_bytes() const override { return n_bytes; }
    void   attach(ggml_backend_t b) override { backend = b; }
    void   prepare(const scoring_shape & shape) override;
    void   run(const scoring_inputs & in, float * out, float * out_missed) override;
    void   before_writes() override {} // that work is given to the same backend, which has an order
    void   wait() override;

    ggml_cgraph * newest() const; // for tests: what was prepared last

private:
    struct graph; // of one shape

    void reserve();
    void check_ops(const graph & g) const;

    const device_part part;
    ggml_backend_t    backend = nullptr;
    ggml_gallocr_ptr  room;
    size_t            n_bytes = 0;
    std::list<graph>  graphs; // the newest first
};

} // namespace asrkf
