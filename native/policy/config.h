// Configuration: one table of keys, read from and written as "name,key=value,...". Knows no tensor and no llama.cpp.
#pragma once

#include "common.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace asrkf {

const char * policy_name(int32_t policy);

asrkf_config config_default(int32_t policy);             // throws error
asrkf_config config_parse(const std::string & text);     // throws error
std::string  config_format(const asrkf_config & config);
void         config_check(const asrkf_config & config);  // ranges and syntax; throws error
size_t       config_n_fields();
asrkf_field  config_field(size_t i);

// Syntax of the text keys. Ranges are half open in positions, inclusive in layers ("0-3" is four layers).
using ranges = std::vector<std::pair<int32_t, int32_t>>;
ranges parse_positions(const char * key, const std::string & text);  // "0-128+512-640"
ranges parse_layers(const char * key, const std::string & text);     // "0-3+7"

uint32_t count_positions(ranges set);                                // of ranges that may overlap, each once
bool     contains(const ranges & set, int32_t pos);
ranges   without(const ranges & set, int32_t p0, int32_t p1);        // what remains outside [p0, p1)

struct group_spec { ranges layers; uint32_t pool_cells; };
// "0-8@512/9-29@1024": empty for "shared", "two" and "each"
std::vector<group_spec> parse_groups(const std::string & text);

constexpr uint32_t POOL_PAD_CELLS = 256; // CUDA's grouped attention kernels want n_kv % 256 == 0; get_n_kv pads to it

// A pool that is as large as its bytes allow: those that it was given, or (auto) that the devices have.
bool is_pool_of_bytes(const asrkf_config & config);
bool has_auto_pool(const asrkf_config & config);

// Of a pool in cells or a part of n_ctx: cells, rounded up to a multiple of POOL_PAD_CELLS, at most n_ctx. As a mean of layers that have
// such multiples each it need be none itself. Throws error.
uint32_t resolve_pool(const asrkf_config & config, uint32_t n_ctx, bool is_mean = false);

} // namespace asrkf
