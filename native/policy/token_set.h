// A set of tokens, by number: one bit for each, in words of 64, so that a question about all of them is asked of 64 at a time.
#pragma once

#include "common.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

class token_set {
public:
    uint32_t size() const { return n; }       // tokens that there are, in the set or not
    uint32_t n_in() const { return n_members; }
    uint32_t n_words() const { return uint32_t(words.size()); }
    const uint64_t * data() const { return words.data(); }
    // An empty set's words are not looked at: those of many sets do not fit the processor's cache.
    uint64_t word(uint32_t w) const { return n_members > 0 && w < words.size() ? words[w] : 0; }
    bool     has(uint32_t i) const { return n_members > 0 && (words[i / 64] >> (i % 64) & 1); }
    void     put(uint32_t i, bool in) {
        if (in != has(i)) {
            words[i / 64] ^= uint64_t(1) << (i % 64);
            n_members += in ? 1u : ~0u;
        }
    }
    void     put_in(uint32_t w, uint64_t bits) { // those of word w
        n_members += count(bits & ~words[w]);
        words[w] |= bits;
    }
    uint32_t count(uint32_t begin, uint32_t end) const; // of [begin, end)
    uint32_t end() const;                               // behind the last

    void reserve(size_t n_more) { make_room(words, n_more / 64 + 1); }
    // Tokens come and go: those behind move up or down.
    void insert(uint32_t at, bool in);
    void erase(uint32_t begin, uint32_t end);
    void reorder(const std::vector<uint32_t> & order);  // which comes first, second, ...
    void assign(uint32_t size) { // none of so many
        n = size;
        n_members = 0;
        words.assign((size + 63) / 64, 0);
    }

    // The part of [begin, end) that lies in word w.
    static uint64_t within(uint32_t w, uint32_t begin, uint32_t end) {
        const uint64_t first = uint64_t(w)*64;
        if (begin >= end || end <= first || begin >= first + 64) {
            return 0;
        }
        const uint64_t from = begin > first ? ~uint64_t(0) << (begin - first) : ~uint64_t(0);
        return end < first + 64 ? from & ~(~uint64_t(0) << (end - first)) : from;
    }
    static uint32_t count(uint64_t bits) { return uint32_t(__builtin_popcountll(bits)); }
    // The tokens of word w that these bits stand for, in order.
    template <typename Body> static void each(uint32_t w, uint64_t bits, Body body) {
        for (; bits; bits &= bits - 1) {
            body(w*64 + uint32_t(__builtin_ctzll(bits)));
        }
    }

private:
    std::vector<uint64_t> words; // bits past the last token are 0
    uint32_t              n         = 0;
    uint32_t              n_members = 0;
};

} // namespace asrkf
