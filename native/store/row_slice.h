// Rows of one tensor that move together, as a device reads them: plain numbers, for kernels, too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace asrkf {

// Places are bytes in the memory that the rows cross in (row_copier.h).
struct row_slice {
    uint8_t * base;      // the tensor's first row
    size_t    stride;    // bytes from row to row
    size_t    cells_at;  // numbers of the tensor's rows, uint32_t [n_rows]
    size_t    rows_at;   // their bytes, one row behind the other
    uint32_t  row_bytes; // any number
    uint32_t  n_rows;
};

} // namespace asrkf
