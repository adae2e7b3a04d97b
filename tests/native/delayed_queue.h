// A queue of work that is done when somebody waits for it, and not before: what orders queues among each other has to say so.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

struct delayed_queue {
    bool at_once = false; // work is done as it is given

    void later(std::function<void()> job) {
        jobs.push_back(std::move(job));
        if (at_once) {
            work();
        }
    }
    void work(size_t until = SIZE_MAX) { // the first jobs, counted from the beginning
        for (; n_done < std::min(until, jobs.size()); ++n_done) {
            jobs[n_done]();
            jobs[n_done] = nullptr;
        }
    }
    size_t n_given() const { return jobs.size(); }
    size_t n_waiting() const { return jobs.size() - n_done; }

private:
    std::vector<std::function<void()>> jobs;
    size_t                             n_done = 0;
};

// What a queue had been given when this was recorded.
struct delayed_event {
    delayed_queue * queue    = nullptr;
    size_t          position = 0;

    void record(delayed_queue & on) { *this = { &on, on.n_given() }; }
    void synchronize() const {
        if (queue) {
            queue->work(position);
        }
    }
    // What that queue is given from now on comes after this. Recorded again, it is another matter.
    void hold_back(delayed_queue & other) const {
        if (queue && queue != &other) {
            other.later([recorded = *this] { recorded.synchronize(); });
        }
    }
};
