#pragma once

#include <cstdint>
#include <string>

namespace asrkf {

// Bytes of RAM that this process may still take, as Linux tells: what is available, and in a container no more than its memory
// limit leaves. UINT64_MAX where nothing is told. root: the folder in which /proc and /sys lie.
uint64_t available_ram(const std::string & root = "");

} // namespace asrkf
