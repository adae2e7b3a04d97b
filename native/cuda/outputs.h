// Output rows read by the kernel of entropy.cu, on a stream of its own: 24 bytes come to the host where a row of logits takes half a
// megabyte, and nobody adds up 128,000 exponentials there. Ordered both ways with the backend, as scorer.h says of scores.
#pragma once

#include "scoring/output_reader.h"

namespace asrkf::cuda {

// Throws error(ASRKF_INTERNAL) where the device fails or has no memory.
std::unique_ptr<output_reader> make_output_reader(ggml_backend_dev_t device, uint32_t n_slots);

} // namespace asrkf::cuda
