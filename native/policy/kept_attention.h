// What a calibration makes of the attention of one text: which tokens a small pool would keep, and which layers' ranking keeps
// most of what all layers attend to. Numbers in, decisions out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

// Attention probability of one layer: for each chunk of queries, a mean over heads and queries; [chunk][token].
using chunk_attention = std::vector<std::vector<float>>;

// Which of the tokens before a chunk of queries stay active: the sinks, a window of half of keep_ratio of them, and the
// best by the attention of the two chunks before it, summed over the layers. Tokens of the chunk itself do. 1 or 0 for each.
std::vector<float> kept_tokens(const std::vector<const chunk_attention *> & layers, size_t chunk, uint32_t chunk_tokens, float keep_ratio);

// For each layer the part of its attention that the ranking of some layers (indices into `layers`) loses, a mean over the
// chunks from first_chunk on.
std::vector<double> lost_attention(const std::vector<chunk_attention> & layers, const std::vector<uint32_t> & scoring, size_t first_chunk, uint32_t chunk_tokens, float keep_ratio);

// Which layers should score, ascending indices: beginning with default_scoring_layers(), one part of the depth after the other
// takes the layer with which the predicted loss is least. A layer's loss is taken to grow with the square of the attention
// that is lost, and to be the measured one where the layer's own ranking chooses.
std::vector<uint32_t> best_scoring_layers(const std::vector<chunk_attention> & layers, const std::vector<double> & losses, size_t first_chunk, uint32_t chunk_tokens);

} // namespace asrkf
