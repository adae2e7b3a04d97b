// The threshold driver, of `paper` (arXiv 2512.11221) and its control `flag-all`: who scores below tau is flagged, and frozen
// for floor(sqrt(c)/k) checks, c being how often it was flagged.
#include "policy/policy.h"
#include "policy/selection.h"

namespace asrkf {

void policy::decide_by_threshold(plan & result, uint32_t capacity, span h) const {
    std::vector<uint32_t> stays;
    for (uint32_t w = h.begin / 64; w*64 < h.end; ++w) {
        token_set::each(w, history_of(w, h) & active.word(w), [&](uint32_t i) {
            const bool flagged = rank(i) < params.tau;
            if (flagged) {
                result.flagged.push_back(i);
            }
            (flagged && timer(histories[i].count + 1) >= 1 ? result.freeze : stays).push_back(i);
        });
    }
    if (stays.size() > capacity) { // the hard bound, which the paper does not have
        select(stays, capacity, [&](uint32_t a, uint32_t b) {
            const float of_a = rank(a), of_b = rank(b);
            return of_a != of_b ? of_a > of_b : a > b;
        });
        result.freeze.insert(result.freeze.end(), stays.begin() + capacity, stays.end());
        stays.resize(capacity);
    }
    const auto in_history = [&](uint32_t i) { return history_of(i / 64, h) >> (i % 64) & 1; };
    for (const uint32_t i : first_expired(capacity - stays.size(), in_history)) {
        result.restore.push_back({ i, cause::timer });
    }
}

} // namespace asrkf
