// How this room says no: a status and a text for the caller, once for the log.
#pragma once

#include "common.h"

namespace asrkf {

[[noreturn]] void unsupported(const std::string & text);

// The thread's last error, and a line in llama.cpp's log.
void refuse(const std::string & text, asrkf_status status = ASRKF_UNSUPPORTED);
void refuse(const std::exception & e);

} // namespace asrkf
