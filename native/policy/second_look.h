// Which tokens are computed a second time: numbers in, decisions out. Knows no tensor and no llama.cpp.
//
// A token has a second look if its figure (how much attention it missed) is among the largest `share` of this run's newest
// figures, and a look is left. Each token brings `share` of a look, and a few may be saved. So there are never more looks than
// that share of the tokens, whatever the figures do: figures that only rise would all be the largest of their run.
#pragma once

#include "common.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

class look_rule {
public:
    look_rule(look_trigger_kind kind, float share, uint32_t seed) : kind(kind), share(share), seed(seed) {}

    // A token that may have one: is it looked at again? What is no number is not.
    bool observe(double figure);
    void clear();

    static constexpr size_t HISTORY = 256;
    static constexpr size_t LEAST   = 32; // figures before one can be judged
    static constexpr double SAVED   = 8;  // looks, at most

private:
    const look_trigger_kind kind;
    const double            share;
    const uint32_t          seed;

    std::vector<double> figures; // a ring
    uint64_t            n_figures = 0;
    double              n_left    = 0;
};

} // namespace asrkf
