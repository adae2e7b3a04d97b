#pragma once

#include <cstdint>
#include <string>

namespace asrkf {

// Bytes of RAM that this process may still take, as Linux tells: what is available, and in a container no more than its memory
// limit leaves. UINT64_MAX where nothing is told. root: the folder in which /proc and /sys lie.
uint64_t available_ram(const std::string & root = "");

// Freed memory to the system. glibc takes blocks of a few MB from its own heap once some were freed, finds no place in what it has kept
// when it needs the next ones, and grows.
void give_back_freed_ram();

} // namespace asrkf
