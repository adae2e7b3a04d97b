#include "llama/calibration.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>

namespace asrkf {

calibration read_calibration(const std::string & path) {
    std::ifstream file(path);
    if (!file) {
        throw error(ASRKF_INVALID_ARGUMENT, format("calibration=%s cannot be read: run asrkf calibrate, or drop the key", path.c_str()));
    }
    try {
        const auto json = nlohmann::json::parse(file);
        if (json.at("format") != "asrkf-calibration" || json.at("version") != 2) {
            throw error(ASRKF_INVALID_ARGUMENT, "format or version is another one");
        }
        calibration result = { json.at("model").get<std::string>(), json.at("sensitivities").get<std::vector<double>>(), {} };
        for (const auto & layer : json.at("score_layers")) { // get() would round, or wrap
            if (!layer.is_number_unsigned() || layer.get<uint64_t>() > 1u << 20) {
                throw error(ASRKF_INVALID_ARGUMENT, "score_layers holds what is no layer");
            }
            result.score_layers.push_back(layer.get<uint32_t>());
        }
        for (const double s : result.sensitivities) {
            if (!std::isfinite(s) || s <= 0) {
                throw error(ASRKF_INVALID_ARGUMENT, "a sensitivity is not positive");
            }
        }
        if (result.score_layers.empty() || std::adjacent_find(result.score_layers.begin(), result.score_layers.end(), std::greater_equal<>()) != result.score_layers.end()) {
            throw error(ASRKF_INVALID_ARGUMENT, "score_layers does not ascend");
        }
        return result;
    } catch (const std::exception & e) {
        throw error(ASRKF_INVALID_ARGUMENT, format("calibration=%s is not a file of asrkf calibrate (%s): run it again", path.c_str(), e.what()));
    }
}

} // namespace asrkf
