// What a calibration makes of the attention of one text: which tokens a small pool would keep. Numbers in, decisions out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

// Attention probability of one layer: for each chunk of queries, a mean over heads and queries; [chunk][token].
using chunk_attention = std::vector<std::vector<float>>;

// Which of the tokens before a chunk of queries stay active: the sinks, a window of half of keep_ratio of them, and the
// best by the attention of the two chunks before it. Tokens of the chunk itself do. 1 or 0 for each.
std::vector<float> kept_tokens(const chunk_attention & attention, size_t chunk, uint32_t chunk_tokens, float keep_ratio);

} // namespace asrkf
