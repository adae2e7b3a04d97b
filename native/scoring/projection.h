// Where a graph's queries come from.
#pragma once

struct ggml_tensor;

namespace asrkf {

// A tensor that belongs to a model, not to a graph.
bool is_weights(const ggml_tensor * t);

// What the matrix that makes these queries is multiplied with: the layer's normalised input. NULL where no such matrix is found.
ggml_tensor * projected_input(const ggml_tensor * q);

} // namespace asrkf
