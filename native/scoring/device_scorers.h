// The scorers of all devices that hold scoring layers, as one.
#pragma once

#include "scoring/device_scorer.h"

namespace asrkf {

// For tests: the n-th run of this thread from now on fails; 0: none.
extern thread_local uint32_t fail_scoring_in;

class device_scorers {
public:
    // largest: shapes that all others are parts of. no_alloc: sizes only. Throws error(ASRKF_UNSUPPORTED) where a device lacks
    // an operation, error(ASRKF_INTERNAL) without memory.
    device_scorers(const relevance & kept, const std::vector<scoring_shape> & largest, bool no_alloc);

    size_t size() const { return all.size(); }
    size_t device_bytes() const;
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> breakdown() const;
    std::string kinds() const; // that run, by name and each once, joined by "+"
    const std::vector<std::string> & notes() const { return to_say; } // a sentence each: why a device has the portable graph, and what else is amiss

    // Rows that are scored where so many are used.
    uint32_t size_class(uint32_t n_used) const { return rows_to_score(n_used, n_rows); }

    // The backends that compute the model's graphs.
    void attach(const std::vector<ggml_backend_t> & backends);
    bool is_attached() const { return attached; }
    // As device_scorer.h has them. In out and out_missed devices come one after the other.
    void prepare(const scoring_shape & shape);
    void run(const scoring_inputs & in, float * out, float * out_missed);
    void before_writes();
    void wait();

private:
    struct member {
        std::unique_ptr<device_scorer> scorer;
        ggml_backend_buffer_type_t     buft;
        uint32_t                       n_heads;
    };
    std::unique_ptr<device_scorer> make(const device_part & part);

    const uint32_t           n_rows;
    std::vector<member>      all;
    std::vector<std::string> to_say;
    uint32_t                 n_scored = 0; // as prepared last
    bool                     attached = false;
};

} // namespace asrkf
