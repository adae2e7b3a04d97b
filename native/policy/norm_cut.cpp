#include "policy/norm_cut.h"

#include "policy/policy.h"

#include <algorithm>
#include <cmath>

namespace asrkf {

void norm_cut::add_layer(const std::vector<float> & weights, uint32_t n_tokens) {
    std::vector<double> norms(losses.size(), 0); // summed over heads, of what is left when so many have gone
    for (auto head = weights.begin(); head != weights.end(); head += n_tokens) {
        const auto square = [&](uint32_t token) { return double(head[token])*double(head[token]); };
        double sum = 0;
        for (const uint32_t token : stay) {
            sum += square(token);
        }
        norms.back() += std::sqrt(sum);
        for (size_t k = order.size(); k-- > 0; ) { // from the last to go backwards: small weights are not lost beside large ones
            sum += square(order[k]);
            norms[k] += std::sqrt(sum);
        }
    }
    for (size_t k = 0; k < losses.size(); ++k) {
        losses[k] += norms[0] == 0 ? 0 : 1 - norms[k] / norms[0];
    }
    n_layers++;
}

size_t norm_cut::largest(float tolerance) const {
    size_t k = order.size();
    while (k > 0 && !(losses[k] <= double(tolerance)*n_layers)) { // so not a number keeps all
        k--;
    }
    return k;
}

//
// a sequence's decision
//

norm_cut policy::cut_before(int32_t pos_end) const {
    const span h = history_before(pos_end);
    std::vector<uint32_t> may_go, stay;
    for (uint32_t i = h.begin; i < n_tokens(); ++i) {
        if (!held.has(i)) { // what was frozen by request is not the rule's
            (i < h.end && history_of(i / 64, h) >> (i % 64) & 1 ? may_go : stay).push_back(i);
        }
    }
    if (params.cuts_by_score) {
        std::stable_sort(may_go.begin(), may_go.end(), [&](uint32_t a, uint32_t b) { return ranks->score(a) < ranks->score(b); });
    }
    return { std::move(may_go), std::move(stay) };
}

plan policy::decide_cut(const norm_cut & measured, int32_t pos_end, cut_result & out) const {
    const span h = history_before(pos_end);
    const std::vector<uint32_t> & order = measured.may_go();
    plan result;
    result.decided = true;
    result.why     = occasion::prompt_end;
    restore_protected(result, h);
    const uint64_t n_room      = params.pool_cells - std::min<uint64_t>(params.pool_cells, n_protected(h) + params.interval); // the next steps need some
    const size_t   n_wanted    = measured.largest(params.tolerance);
    const size_t   n_go        = std::max<size_t>(n_wanted, order.size() - std::min<uint64_t>(order.size(), n_room));
    for (size_t k = 0; k < order.size(); ++k) {
        if (k < n_go && !is_frozen(order[k])) {
            result.freeze.push_back(order[k]);
        } else if (k >= n_go && is_frozen(order[k])) {
            result.restore.push_back({ order[k], cause::refill });
        }
    }
    std::sort(result.freeze.begin(), result.freeze.end());
    out.n_tokens = n_tokens();
    out.n_kept   = uint32_t(n_active() + result.restore.size() - result.freeze.size());
    out.n_wanted = uint32_t(out.n_kept + n_go - n_wanted);
    return result;
}

} // namespace asrkf
