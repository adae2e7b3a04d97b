#include "policy/token_set.h"

namespace asrkf {

uint32_t token_set::count(uint32_t begin, uint32_t end) const {
    uint32_t sum = 0;
    for (uint32_t w = begin / 64; w*64 < end; ++w) {
        sum += count(word(w) & within(w, begin, end));
    }
    return sum;
}

uint32_t token_set::end() const {
    for (uint32_t w = n_words(); w-- > 0; ) {
        if (words[w]) {
            return w*64 + 64 - uint32_t(__builtin_clzll(words[w]));
        }
    }
    return 0;
}

void token_set::insert(uint32_t at, bool in) {
    words.resize((n + 64) / 64, 0);
    for (uint32_t w = n / 64; w > at / 64; --w) {
        words[w] = words[w] << 1 | words[w - 1] >> 63;
    }
    const uint64_t low = (uint64_t(1) << (at % 64)) - 1; // of the word that it comes into, what stands before it
    uint64_t & bits = words[at / 64];
    bits = (bits & low) | (bits & ~low) << 1 | uint64_t(in) << (at % 64);
    n++;
    n_members += in;
}

void token_set::erase(uint32_t begin, uint32_t end) {
    if (begin >= end) {
        return;
    }
    n_members -= count(begin, end);
    const uint32_t gone = end - begin, first = begin / 64, shift = gone % 64;
    const uint64_t low = (uint64_t(1) << (begin % 64)) - 1, before = words[first] & low;
    n -= gone;
    for (uint32_t w = first; w*64 < n; ++w) { // reads ahead of where it writes
        const uint32_t from = w + gone / 64;
        words[w] = shift ? word(from) >> shift | word(from + 1) << (64 - shift) : word(from);
    }
    if (first*64 < n) {
        words[first] = (words[first] & ~low) | before;
    }
    words.resize((n + 63) / 64);
    if (n % 64) {
        words.back() &= ~(~uint64_t(0) << (n % 64));
    }
}

void token_set::reorder(const std::vector<uint32_t> & order) {
    token_set moved;
    moved.assign(n);
    for (uint32_t i = 0; i < n; ++i) {
        moved.put(i, has(order[i]));
    }
    words.swap(moved.words);
}

} // namespace asrkf
