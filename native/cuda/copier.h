// Rows moved by the kernel of rows.cu: all groups' in one launch, straight to and from pinned host memory. On a stream of its own, ordered
// both ways with the backend, as scorer.h says of scores.
#pragma once

#include "store/row_copier.h"

namespace asrkf::cuda {

// Throws error(ASRKF_UNSUPPORTED) where the program has no kernel for the device, error(ASRKF_INTERNAL) where that fails.
std::unique_ptr<row_copier> make_row_copier(ggml_backend_dev_t device);

} // namespace asrkf::cuda
