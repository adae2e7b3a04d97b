// What all layer groups know alike of one sequence's tokens: positions, pins, and how much the newest queries attend to
// each. One ranking serves them all; each group's policy cuts it where its own pool ends.
//
// Tokens are numbered by order of position (0 is the oldest).
//
// Nobody sorts all tokens. A pass over the scores puts each token on one of LEVELS levels, from the worst to the best, and
// keeps for each level which tokens are on it or above: a bit a token. So a group finds its worst active and its best frozen
// tokens 64 at a time, and looks only at the scores of those near its own threshold. Levels are a coarse form of the score, a
// higher one is never worse: what is decided by level and then by score is decided as by score alone.
#pragma once

#include "policy/token_set.h"

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

namespace asrkf {

constexpr uint32_t RECALL_BLOCK = 16; // tokens that are recalled together: an answer is longer than a token

class ranking {
public:
    // ema: weight of the old score after an interval of tokens.
    ranking(float ema, uint32_t interval) : ema(ema), interval(interval) {}

    // Bookkeeping, by the engine. Positions ascend.
    void reserve(size_t n_more); // so many can be inserted, whatever memory is left
    void insert(uint32_t token, int32_t pos);
    void copy_token(uint32_t token, const ranking & from, uint32_t from_token); // its scores
    void move_to(uint32_t token, int32_t pos);                                  // positions have changed
    void reorder(const std::vector<uint32_t> & order);                          // and no longer ascended: which token comes first, second, ...
    void erase(uint32_t begin, uint32_t end);
    void clear();
    void set_pinned(uint32_t token, bool pinned) { pins.put(token, pinned); }

    // A fresh score: averaged over heads, and of the head that wants it most. The old average counts `keep`, see average_weight().
    void observe(uint32_t token, float score, float peak, float keep) {
        if (blend(scores[token], score, peak, keep)) {
            peaks[token] = peak;
            surveyed = false;
        }
    }
    // The same of one average. False: not a number has no order, and would stay in the average.
    static bool blend(float & average, float score, float peak, float keep) {
        if (!(score - score == 0 && peak - peak == 0)) {
            return false;
        }
        average = average == UNSEEN ? score : keep*average + (1 - keep)*score;
        return true;
    }
    // ema is for an interval of tokens: a step of many leaves less of the old average.
    float average_weight() const;
    // A step's tokens have been inserted.
    void     advance(uint32_t n_new, bool scored);
    uint32_t n_since_score() const { return tokens_since_score; }

    uint32_t n_tokens() const { return uint32_t(positions.size()); }
    int32_t  pos(uint32_t token) const { return positions[token]; }
    float    score(uint32_t token) const { return scores[token]; }
    float    peak(uint32_t token) const { return peaks[token]; }
    const token_set & pinned() const { return pins; }
    // The first token at pos or later.
    uint32_t lower_bound(int64_t pos) const;

    // Levels of the scores as they are now.
    uint32_t         level_of(float score) const;
    const uint64_t * at_least(uint32_t level) const; // by word: who is on this level or above
    float            least(uint32_t level) const;    // no score of this level or above is lower; of a level above 0
    // Blocks of RECALL_BLOCK tokens by their highest peak, the later of two equal ones first: the k-th, and which of its tokens
    // has that peak; past the last with any peak: peak 0.
    struct block { float peak; uint32_t top; };
    block  best_block(size_t k) const;

    // Scores as bytes of a saved state: see policy::save().
    void load(const std::vector<uint8_t> & bytes);

    static constexpr float    UNSEEN = std::numeric_limits<float>::max(); // no step has scored it yet: not known to be unimportant
    static constexpr uint32_t LEVELS = 96;

private:
    friend class policy; // saves what is here, for a state

    static constexpr uint32_t KEY_BITS = 13; // of a score's bits: sign, exponent, four of the fraction
    static uint32_t key_of(float score);

    void survey() const;
    void choose_levels() const;
    void place_tokens() const;
    void place_blocks() const;

    const float    ema;
    const uint32_t interval;
    std::vector<int32_t> positions;
    std::vector<float>   scores;
    std::vector<float>   peaks;
    token_set            pins;
    uint32_t tokens_since_score = 0;
    uint32_t tokens_of_score    = 1; // that the last scores stand for

    // Made from the scores when first asked for.
    mutable bool surveyed = false;
    mutable std::array<uint8_t, 1 << KEY_BITS> level_by_key = {};
    mutable std::array<uint32_t, LEVELS>       least_key    = {};
    mutable std::vector<uint64_t>              upward; // by level, then by word
    mutable uint32_t                           stride = 0;
    mutable std::vector<uint64_t>              blocks; // peak, then its first token; the first n_sorted descend, and have the token with the peak instead
    mutable size_t                             n_sorted = 0;
};

} // namespace asrkf
