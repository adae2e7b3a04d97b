// What computes the scores of the scoring layers on one device: the attention of the kept queries over the whole index. The
// portable one is a graph of ggml's operations (scoring_graph.h). A device for which there is something faster names it
// here, so that this room need not know it. All give the same numbers in the same form, but for rounding.
//
// Besides means and peaks they tell what attention misses: of each head of each scoring layer, the probability that falls on
// frozen tokens.
#pragma once

#include "scoring/relevance.h"

#include <memory>

namespace asrkf {

// What a run reads.
struct scoring_inputs {
    std::vector<int32_t> scoring; // rows of the rings that score
    std::vector<float>   mask;    // as relevance::write_mask() has it
    std::vector<float>   frozen;  // [n_scored, n_sets]: part of a row's tokens that is; empty for magnitudes, which are no probabilities
};

// The scoring layers whose index one device holds.
struct device_part {
    const relevance *          kept;
    ggml_backend_buffer_type_t buft;
    ggml_backend_dev_t         device;
    std::vector<size_t>        layers;   // places among those of `kept`
    std::vector<scoring_shape> largest;  // shapes that all others are parts of; their rows are those of `kept`
    bool                       no_alloc; // sizes only

    uint32_t n_heads() const;
};

std::vector<device_part> parts_of(const relevance & kept, const std::vector<scoring_shape> & largest, bool no_alloc);

// Rows that are scored where so many are used, of n_rows: four sizes to an octave.
uint32_t rows_to_score(uint32_t n_used, uint32_t n_rows);

class device_scorer {
public:
    // Waits for what is still on its way. The backend may be gone by now; the index may not.
    virtual ~device_scorer() = default;

    virtual const char * kind() const = 0; // as asrkf_stats names it
    virtual size_t device_bytes() const = 0;
    virtual std::string note() const { return ""; } // what a user should know of how it runs

    // The backend that computes the model's graphs on this device. It must outlive every call but the destructor.
    virtual void attach(ggml_backend_t backend) = 0;
    // Make ready for runs of this shape. Throws error(ASRKF_INTERNAL) without memory.
    virtual void prepare(const scoring_shape & shape) = 0;
    // Score what was prepared last as the work that the backend has by now will leave it. Returns at once. To out go the means,
    // then the peaks, n_scored of each; to out_missed what each head misses. Inputs and outputs must stay until wait(). Throws
    // error(ASRKF_INTERNAL) if the device fails: the outputs are then undefined.
    virtual void run(const scoring_inputs & in, float * out, float * out_missed) = 0;
    // Before the backend gets work that writes index or rings: that work will come after the last run. Throws as wait() does.
    virtual void before_writes() = 0;
    // Until the last run is over. Throws error(ASRKF_INTERNAL) if the device failed meanwhile.
    virtual void wait() = 0;
};

// A kind of scorer that serves some devices in place of the portable graph.
struct scorer_kind {
    bool (*serves)(ggml_backend_dev_t device);
    // Throws error(ASRKF_UNSUPPORTED) where it cannot do this part, and says why: the portable graph does it then.
    std::unique_ptr<device_scorer> (*make)(const device_part & part);
};

// Asked from now on, the newest first. Returns true.
bool add_scorer_kind(const scorer_kind & kind);
const std::vector<scorer_kind> & scorer_kinds();

} // namespace asrkf
