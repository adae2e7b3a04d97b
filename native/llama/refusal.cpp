#include "llama/refusal.h"

#include "llama/engine.h"

#include "llama-impl.h"

namespace asrkf {

namespace {

thread_local std::string  last_error;
thread_local asrkf_status last_status = ASRKF_OK;

} // namespace

void set_last_error(const std::string & text, asrkf_status status) {
    last_error  = text;
    last_status = status;
}

const char * get_last_error() { return last_error.c_str(); }
asrkf_status get_last_status() { return last_status; }

void unsupported(const std::string & text) { throw error(ASRKF_UNSUPPORTED, text); }

void refuse(const std::string & text, asrkf_status status) {
    set_last_error(text, status);
    LLAMA_LOG_ERROR("asrkf: %s\n", text.c_str());
}

void refuse(const std::exception & e) {
    const auto * known = dynamic_cast<const error *>(&e);
    refuse(text_of(e), known ? known->status : ASRKF_INTERNAL);
}

} // namespace asrkf
