// What the triggers of a run share: the newest figures, how far out one of them is, and chance, which repeats.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

// The n_before-th and newest value into a ring of at most n_most.
template <typename T> void keep_newest(std::vector<T> & ring, size_t n_most, uint64_t n_before, T value) {
    if (ring.size() < n_most) {
        ring.push_back(value);
    } else {
        ring[size_t(n_before % n_most)] = value;
    }
}

// The value that this part of them is below. Of at least one.
inline double quantile(std::vector<double> values, double ratio) {
    const size_t i = std::min(values.size() - 1, size_t(std::max(0.0, ratio)*double(values.size())));
    std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(i), values.end());
    return values[i];
}

// Of the n-th time: true for a share of all n, at no n in particular, and always the same for a seed.
inline bool by_chance(uint32_t seed, uint64_t n, double share) {
    const uint64_t x = (uint64_t(seed) << 32 ^ n)*0x9e3779b97f4a7c15ull;
    return double((x ^ x >> 29)*0xbf58476d1ce4e5b9ull >> 40) / double(1 << 24) < share;
}

} // namespace asrkf
