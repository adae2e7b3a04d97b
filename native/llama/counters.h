// What happened, counted: the counters of asrkf_stats as they grow, and the trace of steps where one is asked for.
#pragma once

#include "common.h"

#include <chrono>
#include <cstddef>

namespace asrkf {

struct stopwatch {
    explicit stopwatch(double & sum) : sum(sum), begin(std::chrono::steady_clock::now()) {}
    ~stopwatch() { sum += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); }
    double &                                    sum;
    const std::chrono::steady_clock::time_point begin;
};

struct counters : asrkf_stats {
    counters() : asrkf_stats() {}

    void     clear() { static_cast<asrkf_stats &>(*this) = {}; }
    uint64_t n_restores() const {
        return restores_timer_total + restores_window_total + restores_refill_total + restores_recall_total + restores_recovery_total;
    }
};

// A ring of the caller's.
struct step_trace {
    asrkf_step * buffer   = nullptr;
    size_t       capacity = 0;
    uint64_t     count    = 0;
};

} // namespace asrkf
