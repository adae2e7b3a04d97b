// The part of a state that llama.cpp does not have: for each sequence its pins and, by layer group, what its policy knows
// (scores, timers, what was frozen). It stands before upstream's format, behind a mark that upstream's reader takes for a
// number of streams that it does not have:
//     mark, version, size (u64), checksum (u64), and then size bytes: the model's name; for each sequence its number, pins, policies
#pragma once

#include "policy/config.h"

#include "llama-io.h"

namespace asrkf {

constexpr uint32_t STATE_MARK = 0x4b525341; // "ASRK"

struct saved_sequence {
    uint32_t                          id;
    ranges                            pinned;
    std::vector<std::vector<uint8_t>> rules; // policy::save(), by group
};

void write_u32(llama_io_write_i & io, uint32_t value);
uint32_t read_u32(llama_io_read_i & io);
// Throws error(ASRKF_INVALID_ARGUMENT).
[[noreturn]] void unfit(const std::string & what);

void write_policies(llama_io_write_i & io, const std::string & model_name, const std::vector<saved_sequence> & saved);
// After the mark. most_bytes: far more than any context of this size has, and little enough to ask for. Throws
// error(ASRKF_INVALID_ARGUMENT) if it is damaged, of another version or of another model.
std::vector<saved_sequence> read_policies(llama_io_read_i & io, const std::string & model_name, uint64_t most_bytes);

} // namespace asrkf
