#include "llama/find_calibration.h"

#include "llama/calibration.h"
#include "llama/creation.h"
#include "llama/engine.h"
#include "policy/config.h"
#include "policy/policy.h"

#include "llama-impl.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>

namespace asrkf {

namespace {

constexpr size_t LONGEST_PATH = sizeof(asrkf_config::calibration);

thread_local calibrator next_calibrator;

std::string environment(const char * name) {
    const char * value = getenv(name);
    return value ? value : "";
}

std::filesystem::path cache_folder() {
    if (const std::string own = environment("ASRKF_CACHE"); !own.empty()) {
        return own;
    }
#if defined(_WIN32)
    return std::filesystem::path(environment("LOCALAPPDATA")) / "asrkf-gguf" / "Cache";
#elif defined(__APPLE__)
    return std::filesystem::path(environment("HOME")) / "Library" / "Caches" / "asrkf-gguf";
#else
    const std::string users = environment("XDG_CACHE_HOME");
    return (users.empty() ? std::filesystem::path(environment("HOME")) / ".cache" : std::filesystem::path(users)) / "asrkf-gguf";
#endif
}

// Does a calibration change anything for this context?
bool is_wanted(const llama_cparams & cparams, const asrkf_config & config) {
    const policy_params rule = make_policy_params(config, 1);
    if ((rule.score != SCORE_ATTENTION && rule.score != SCORE_GATE) || (!rule.cuts && (config.pool_ratio >= 1 || config.pool_cells >= cparams.n_ctx))) {
        return false;
    }
    const bool splits = std::strcmp(config.layers, "two") == 0 || std::strcmp(config.layers, "each") == 0;
    return (rule.score == SCORE_ATTENTION && std::strcmp(config.score_layers, "auto") == 0) || splits;
}

// A file of this model, or a text that says why it is none.
std::string fault_of(const std::string & file, const std::string & fingerprint) {
    try {
        const calibration found = read_calibration(file);
        return found.fingerprint == fingerprint ? "" : format("%s was made for another model", file.c_str());
    } catch (const std::exception & e) {
        return e.what();
    }
}

} // namespace

void set_next_calibrator(const calibrator & next) { next_calibrator = next; }

std::string calibration_file(const std::string & fingerprint) {
    const std::string folder = environment("ASRKF_CALIBRATIONS");
    return ((folder.empty() ? cache_folder() / "calibrations" : std::filesystem::path(folder)) / (fingerprint + ".asrkf.json")).string();
}

std::string gates_file(const std::string & fingerprint) {
    const std::string folder = environment("ASRKF_GATES");
    return ((folder.empty() ? cache_folder() / "gates" : std::filesystem::path(folder)) / (fingerprint + ".asrkf-gates.gguf")).string();
}

std::string found_calibration(const llama_model & model, const llama_cparams & cparams, const asrkf_config & config) {
    if (*config.calibration || model.hparams.no_alloc || !is_wanted(cparams, config)) {
        return config.calibration;
    }
    const std::string own = fingerprint(model), file = calibration_file(own);
    std::string fault;
    if (std::error_code ignored; std::filesystem::exists(file, ignored)) {
        fault = file.size() < LONGEST_PATH ? fault_of(file, own) : "its path is too long: " + file;
        if (fault.empty()) {
            return file;
        }
        LLAMA_LOG_WARN("asrkf: %s\n", fault.c_str());
    }
    if (next_calibrator) {
        const std::string made = next_calibrator(const_cast<llama_model &>(model));
        return !made.empty() && made.size() < LONGEST_PATH && fault_of(made, own).empty() ? made : "off";
    }
    LLAMA_LOG_WARN("asrkf: this model has no calibration: budgets and scoring layers are a guess by depth, which costs quality; run asrkf calibrate MODEL once\n");
    return "off";
}

} // namespace asrkf
