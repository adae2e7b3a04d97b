// How the pool's cells are split among layers: numbers in, layer groups out. Knows no tensor and no llama.cpp.
//
// A layer's sensitivity s is the loss (KL of the output, nats) when only its history is frozen to a fifth. The loss at
// another share f of its tokens is taken as s * (1/f - 1) / (1/0.2 - 1): 0 with everything active. Cells are handed out
// POOL_PAD_CELLS at a time, always to the group whose predicted loss falls most for a byte.
#pragma once

#include "policy/config.h"

#include <cstdint>
#include <vector>

namespace asrkf {

struct layer_budget {
    uint32_t il;
    double   sensitivity;
    uint64_t token_bytes; // K and V of one token in this layer
};

struct group_budget {
    std::vector<uint32_t> layers;
    uint32_t              pool_cells;
};

double predicted_loss(double sensitivity, double active_ratio);

// Together the groups have at most the bytes of mean_cells in every layer, POOL_PAD_CELLS at least; each has a multiple of
// POOL_PAD_CELLS, least_cells to n_ctx, or about mean_cells where that is less.
//
// A budget for each layer, in steps of about a quarter of mean_cells. Layers that get the same one are one group, since with one ranking
// they hold the same tokens; apart: each has a ranking of its own.
std::vector<group_budget> split_each(const std::vector<layer_budget> & layers, uint32_t mean_cells, uint32_t least_cells, uint32_t n_ctx, bool apart = false);
// Two groups: the most sensitive layers, as many as predict the least loss, and the others; one if that predicts less.
std::vector<group_budget> split_two (const std::vector<layer_budget> & layers, uint32_t mean_cells, uint32_t least_cells, uint32_t n_ctx);

// Shares of a pool that several sequences want demands of, in cells: max-min fair. Nobody gets less than an equal part,
// unless it wants less; what is left when all have what they want is shared out evenly.
std::vector<uint32_t> fair_shares(uint32_t pool_cells, const std::vector<uint32_t> & demands);

// Who scores where that was not measured, and where `asrkf calibrate --thorough` begins to search: of n_layers layers (at least
// one) four, or one in four of fewer than 16, each rather late in its part of the depth. Measured on SmolLM2, where three sets of
// four that were spaced otherwise lost up to twice as much; and on Gemma 3 270M, where all three layers without a window lost more
// than one of them: their indices take bytes that cells lack.
std::vector<uint32_t> default_scoring_layers(uint32_t n_layers);

// Sensitivity by relative depth (0: first layer, 1: last) for a model without a calibration: a rough shape of what was
// measured on SmolLM2, where layers at 0.2 to 0.8 of the depth lose most.
double prior_sensitivity(double depth_ratio);

} // namespace asrkf
