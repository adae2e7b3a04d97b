// Which calibration a context has when its settings name none: the one in the cache folder, or one that is made now.
#pragma once

#include "llama/settings.h"

namespace asrkf {

// The side file of the model with this fingerprint: in ASRKF_CALIBRATIONS, or in calibrations/ of the cache folder (ASRKF_CACHE, or
// asrkf-gguf in the user's).
std::string calibration_file(const std::string & fingerprint);

// The same of its gates: in ASRKF_GATES, or in gates/ of the cache folder.
std::string gates_file(const std::string & fingerprint);

// What `calibration` of the settings comes to: a file, or "off" for budgets and scoring layers by depth. A calibration that
// cannot be had is a warning. Throws error(ASRKF_INTERNAL) only where the calibrator asks to stop.
std::string found_calibration(const llama_model & model, const llama_cparams & cparams, const asrkf_config & config);

} // namespace asrkf
