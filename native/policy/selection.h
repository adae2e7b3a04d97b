// The n best of many, for decisions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

// Leave the n best in front; ties go to the later token, so the order is total and the choice repeatable.
template <typename Better>
void select(std::vector<uint32_t> & indices, size_t n, Better better) {
    if (n > 0 && n < indices.size()) {
        std::nth_element(indices.begin(), indices.begin() + std::ptrdiff_t(n), indices.end(), better);
    }
}

} // namespace asrkf
