#include "policy/second_look.h"

#include "policy/running.h"

#include <cmath>

namespace asrkf {

bool look_rule::observe(double figure) {
    if (!std::isfinite(figure)) {
        return false;
    }
    bool due;
    if (kind == LOOK_RANDOM) {
        due = by_chance(seed, n_figures, share);
    } else {
        due = figures.size() >= LEAST && figure > quantile(figures, 1 - share); // judged on the run before it
    }
    keep_newest(figures, HISTORY, n_figures, figure);
    n_figures++;
    n_left = std::min(SAVED, n_left + share);
    if (!due || n_left < 1) {
        return false;
    }
    n_left -= 1;
    return true;
}

void look_rule::clear() {
    figures.clear();
    n_figures = 0;
    n_left    = 0;
}

} // namespace asrkf
