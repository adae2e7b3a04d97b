// The side file of `asrkf calibrate`: how much each layer's history matters, for one model. Knows JSON only.
#pragma once

#include "config.h"

#include <string>
#include <vector>

namespace asrkf {

struct calibration {
    std::string         fingerprint;   // of the model, see asrkf_model_fingerprint()
    std::vector<double> sensitivities; // of the layers that have a KV cache, in order: KL in nats, > 0
};

// Throws error(ASRKF_INVALID_ARGUMENT) if the file cannot be read or is not such a file.
calibration read_calibration(const std::string & path);

} // namespace asrkf
