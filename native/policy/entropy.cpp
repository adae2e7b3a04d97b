#include "policy/entropy.h"

#include "policy/running.h"

#include <algorithm>
#include <cmath>

namespace asrkf {

asrkf_output entropy_of(const float * logits, size_t n) {
    const auto output = [](double log_sum_exp, double entropy, double top) { return asrkf_output { sizeof(asrkf_output), log_sum_exp, entropy, top }; };
    float top = -INFINITY;
    bool  nan = n == 0;
    for (size_t i = 0; i < n; ++i) {
        nan |= std::isnan(logits[i]);
        top  = std::max(top, logits[i]);
    }
    if (nan) {
        return output(NAN, NAN, NAN);
    }
    if (!std::isfinite(top)) { // nothing is allowed, or one logit is infinite
        return output(double(top), 0, top > 0 ? 1 : 0);
    }
    // H = log(sum e^x) - sum(x e^x) / sum(e^x), with x relative to the top: no term overflows, and each is at most 1
    double sum = 0, weighted = 0;
    for (size_t i = 0; i < n; ++i) {
        const float x = logits[i] - top;
        if (x > -80.0f) {
            const double e = double(std::exp(x));
            sum      += e;
            weighted += e*double(x);
        }
    }
    return output(double(top) + std::log(sum), std::max(0.0, std::log(sum) - weighted / sum), 1 / sum);
}

recovery_trigger::recovery_trigger(recovery_kind highest, trigger_kind kind, float share, uint32_t pause_tokens, uint32_t seed)
    : highest(highest == RECOVERY_SECOND_LOOK ? RECOVERY_OFF : highest), kind(kind), share(share), pause_tokens(pause_tokens), seed(seed) {}

void recovery_trigger::clear() {
    entropies.clear();
    changes.clear();
    tokens.clear();
    n_outputs = last_trigger = 0;
    latest = average = squares = smooth = 0;
    level = RECOVERY_OFF;
}

double recovery_trigger::deviation() const { return n_outputs > 1 ? std::sqrt(squares / double(n_outputs - 1)) : 0; }

double recovery_trigger::percentile(double ratio) const { return entropies.empty() ? 0 : quantile(entropies, ratio); }

bool recovery_trigger::is_spike(double change) const { return changes.size() >= LEAST && change > 0 && change > quantile(changes, 1 - double(share)); }

// The last LOOP_SPAN tokens are those of one period before, and the model is surer of them than usual.
bool recovery_trigger::is_loop() const {
    if (n_outputs < HISTORY/2 || latest > percentile(0.25)) {
        return false;
    }
    const auto at = [&](uint64_t back) { return tokens[(n_outputs - 1 - back) % HISTORY]; };
    for (uint64_t period = 1; period + LOOP_SPAN <= std::min<uint64_t>(n_outputs, HISTORY); ++period) {
        uint64_t same = 0;
        while (same < LOOP_SPAN && at(same) == at(same + period)) {
            same++;
        }
        if (same == LOOP_SPAN) {
            return true;
        }
    }
    return false;
}

recovery_kind recovery_trigger::observe(double entropy, int32_t token) {
    if (!std::isfinite(entropy)) {
        return RECOVERY_OFF;
    }
    const double change = n_outputs ? entropy - smooth : 0;
    const bool   spike  = is_spike(change); // judged on the run before it
    keep_newest(entropies, HISTORY, n_outputs, entropy);
    keep_newest(changes, HISTORY, n_outputs, change);
    keep_newest(tokens, HISTORY, n_outputs, token);
    n_outputs++;
    latest  = entropy;
    smooth += (entropy - smooth) / double(std::min<uint64_t>(n_outputs, 16));
    const double before = average;
    average += (entropy - average) / double(n_outputs);
    squares += (entropy - before)*(entropy - average);

    if (highest == RECOVERY_OFF || n_outputs <= LEAST || (last_trigger && n_outputs - last_trigger < pause_tokens)) {
        return RECOVERY_OFF;
    }
    bool due;
    if (kind == TRIGGER_RANDOM) { // the control: as often, at no moment in particular
        due = by_chance(seed, n_outputs, double(share));
    } else {
        due = spike || is_loop();
    }
    if (!due) {
        return RECOVERY_OFF;
    }
    const bool follows = last_trigger && n_outputs - last_trigger < 3*uint64_t(pause_tokens);
    level        = std::min<int32_t>(highest, follows ? level + 1 : RECOVERY_SOFT);
    last_trigger = n_outputs;
    return recovery_kind(level);
}

} // namespace asrkf
