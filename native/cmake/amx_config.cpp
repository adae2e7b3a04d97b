// Does the compiler keep what _tile_loadconfig() reads? Never run: amx.cmake looks for MARK in the object file.
#include <immintrin.h>

#include <cstdint>

constexpr uint32_t MARK = 0xa55ac33c;

struct tile_config {
    uint8_t  palette = 1, start_row = 0, reserved[14] = {};
    uint32_t row_bytes[8] = {}; // two tiles each
    uint8_t  rows[16] = {};
};

void load_config() {
    alignas(64) tile_config config = {};
    config.row_bytes[1] = MARK; // beyond the first eight bytes
    _tile_loadconfig(&config);
}
