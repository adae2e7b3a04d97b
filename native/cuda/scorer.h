// Scores computed by the kernels of relevance.cu, on a stream of their own: beside what the backend does next, sampling above all.
//
// The stream and the backend's queue are ordered both ways. A run begins when the backend has done what it has been given by
// then, so it sees the step's rows and queries. And before the backend gets work that writes index or rings, it is told to wait
// for the run. Both by events of ggml, which hold an event of CUDA; a device that makes none waits on the host instead. ggml's
// streams heed no default stream, so nothing else orders the two.
#pragma once

#include "scoring/device_scorer.h"

namespace asrkf::cuda {

// Throws error(ASRKF_UNSUPPORTED) where the kernels cannot do this part, error(ASRKF_INTERNAL) without memory.
std::unique_ptr<device_scorer> make_scorer(const device_part & part);

} // namespace asrkf::cuda
