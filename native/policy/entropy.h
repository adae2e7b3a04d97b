// Entropy of the output, and when it calls for recovery: numbers in, levels out. Knows no tensor and no llama.cpp.
//
// The paper names entropy-guided recovery as future work, without threshold or trigger. Here a level is due when the
// entropy's change against its running mean is among the largest `share` of this run's changes (a spike), or when the
// text repeats itself while the entropy is low (a loop). Levels escalate while one trigger follows another; after each
// there is a pause.
#pragma once

#include "common.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

// Of softmax(logits): double accumulators, nothing overflows. All three are NaN if a logit is, or without any.
asrkf_output entropy_of(const float * logits, size_t n);

class recovery_trigger {
public:
    // highest: none for RECOVERY_SECOND_LOOK, which starts otherwise (second_look.h).
    recovery_trigger(recovery_kind highest, trigger_kind kind, float share, uint32_t pause_tokens, uint32_t seed);

    // One output: its entropy and the token that it follows. Returns the level that is due, RECOVERY_OFF for none.
    recovery_kind observe(double entropy, int32_t token);
    void clear();

    uint64_t count() const { return n_outputs; }
    double   last() const { return latest; }
    double   mean() const { return average; }
    double   deviation() const;
    double   percentile(double ratio) const; // of the last HISTORY outputs; 0 without any

    static constexpr size_t   HISTORY    = 256;
    static constexpr size_t   LEAST      = 32; // outputs before anything can be judged
    static constexpr size_t   LOOP_SPAN  = 24; // tokens that must repeat

private:
    bool is_spike(double change) const;
    bool is_loop() const;

    const recovery_kind highest;
    const trigger_kind  kind;
    const float         share;
    const uint32_t      pause_tokens;
    const uint32_t      seed;

    std::vector<double>  entropies; // rings of HISTORY
    std::vector<double>  changes;
    std::vector<int32_t> tokens;
    uint64_t n_outputs    = 0;
    double   latest       = 0;
    double   average      = 0; // Welford's running mean and sum of squares
    double   squares      = 0;
    double   smooth       = 0; // exponential mean, against which change is measured
    uint64_t last_trigger = 0;
    int32_t  level        = RECOVERY_OFF;
};

} // namespace asrkf
