// The side file of `asrkf calibrate`: how much each layer's history matters and which layers score, for one model. Knows JSON only.
#pragma once

#include "common.h"

#include <string>
#include <vector>

namespace asrkf {

struct calibration {
    std::string           fingerprint;   // of the model, see asrkf_model_fingerprint()
    std::vector<double>   sensitivities; // of the layers that have a KV cache, in order: KL in nats, > 0
    std::vector<uint32_t> score_layers;  // who scores best, ascending; not empty
};

// Throws error(ASRKF_INVALID_ARGUMENT) if the file cannot be read or is not such a file.
calibration read_calibration(const std::string & path);

} // namespace asrkf
