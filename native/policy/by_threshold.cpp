// The threshold driver, of `paper` (arXiv 2512.11221) and its control `flag-all`: who scores below tau is flagged, and frozen
// for floor(sqrt(c)/k) checks, c being how often it was flagged.
#include "policy/policy.h"
#include "policy/selection.h"

namespace asrkf {

void policy::decide_by_threshold(plan & result, uint32_t capacity, int32_t pos_end) const {
    std::vector<uint32_t> stays;
    std::vector<uint32_t> expired;
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const token & t = tokens[i];
        if (is_protected(i, pos_end)) {
            continue;
        }
        if (t.frozen) {
            if (!t.held && (t.wake <= decision || t.returns)) {
                expired.push_back(i);
            }
        } else if (rank(i) < params.tau) {
            result.flagged.push_back(i);
            (timer(t.count + 1) >= 1 ? result.freeze : stays).push_back(i);
        } else {
            stays.push_back(i);
        }
    }
    // the hard bound, which the paper does not have
    const std::vector<float> ranks = all_ranks();
    const auto better = [&](uint32_t a, uint32_t b) { return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : a > b; };
    if (stays.size() > capacity) {
        select(stays, capacity, better);
        result.freeze.insert(result.freeze.end(), stays.begin() + capacity, stays.end());
        stays.resize(capacity);
    }
    const size_t n_back = std::min<size_t>(expired.size(), capacity - stays.size());
    select(expired, n_back, [&](uint32_t a, uint32_t b) {
        return tokens[a].wake != tokens[b].wake ? tokens[a].wake < tokens[b].wake : a < b;
    });
    for (size_t i = 0; i < n_back; ++i) {
        result.restore.push_back({ expired[i], cause::timer });
    }
}

} // namespace asrkf
