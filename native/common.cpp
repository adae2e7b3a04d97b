#include "common.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <new>

namespace asrkf {

thread_local bool makes_anew = false;

std::string format(const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    va_list again;
    va_copy(again, args);
    const int n = vsnprintf(nullptr, 0, fmt, args);
    va_end(args);
    std::string text(size_t(std::max(n, 0)), '\0');
    vsnprintf(text.data(), text.size() + 1, fmt, again);
    va_end(again);
    return text;
}

std::string text_of(const std::exception & e) {
    return dynamic_cast<const std::bad_alloc *>(&e) ? "host memory has run out: free some, lower n_ctx, or set host_limit" : e.what();
}

} // namespace asrkf
