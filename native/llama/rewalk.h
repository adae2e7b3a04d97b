// The end of a prompt that will not fit its pool: its last tokens once more, as a step of their own, to be computed when the
// blocks that they ask for are back. Such an end is several tokens of one sequence with one output, the last.
#pragma once

#include "llama/tokens.h"

#include "llama-batch.h"

#include <optional>

namespace asrkf {

// The step to add, if these end a prompt that takes one.
std::optional<llama_ubatch> rewalk_of(const std::vector<llama_ubatch> & ubatches, const settings & config, const layer_groups & groups, const token_table & tokens);

} // namespace asrkf
