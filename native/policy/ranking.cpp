#include "policy/ranking.h"

#include "common.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

namespace asrkf {

namespace {

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

} // namespace

void ranking::reserve(size_t n_more) {
    make_room(positions, n_more);
    make_room(scores, n_more);
    make_room(peaks, n_more);
    pins.reserve(n_more);
}

void ranking::insert(uint32_t token, int32_t pos) {
    positions.insert(positions.begin() + token, pos);
    scores.insert(scores.begin() + token, UNSEEN);
    peaks.insert(peaks.begin() + token, 0.0f);
    pins.insert(token, false);
    surveyed = false;
}

void ranking::copy_token(uint32_t token, const ranking & from, uint32_t from_token) {
    scores[token] = from.scores[from_token];
    peaks[token]  = from.peaks[from_token];
    surveyed = false;
}

void ranking::move_to(uint32_t token, int32_t pos) { positions[token] = pos; }

void ranking::reorder(const std::vector<uint32_t> & order) {
    const auto moved = [&](auto & values) {
        const auto before = values;
        for (uint32_t i = 0; i < order.size(); ++i) {
            values[i] = before[order[i]];
        }
    };
    moved(positions);
    moved(scores);
    moved(peaks);
    pins.reorder(order);
    surveyed = false;
}

void ranking::erase(uint32_t begin, uint32_t end) {
    positions.erase(positions.begin() + begin, positions.begin() + end);
    scores.erase(scores.begin() + begin, scores.begin() + end);
    peaks.erase(peaks.begin() + begin, peaks.begin() + end);
    pins.erase(begin, end);
    surveyed = false;
}

void ranking::clear() {
    erase(0, n_tokens());
    tokens_since_score = 0;
}

float ranking::average_weight() const { return std::pow(ema, std::max(1.0f, float(tokens_of_score) / float(interval))); }

void ranking::advance(uint32_t n_new, bool scored) {
    tokens_since_score += n_new;
    if (scored) {
        tokens_of_score    = tokens_since_score;
        tokens_since_score = 0;
    }
}

uint32_t ranking::lower_bound(int64_t pos) const {
    return uint32_t(std::lower_bound(positions.begin(), positions.end(), pos, [](int32_t a, int64_t b) { return a < b; }) - positions.begin());
}

//
// levels
//

// Bits of positive floats ascend as they do; all others are the lowest.
uint32_t ranking::key_of(float score) { return score > 0 ? bits_of(score) >> (32 - KEY_BITS) : 0; }

uint32_t ranking::level_of(float score) const {
    survey();
    return level_by_key[key_of(score)];
}

const uint64_t * ranking::at_least(uint32_t level) const {
    survey();
    return upward.data() + size_t(level)*stride;
}

float ranking::least(uint32_t level) const {
    survey();
    return float_of(least_key[level] << (32 - KEY_BITS));
}

void ranking::survey() const {
    if (!surveyed) {
        choose_levels();
        place_tokens();
        place_blocks();
        surveyed = true;
    }
}

// A tenth of an octave of tokens each, from the worst to the best: a group has a level near where its pool ends.
// Which tokens the sample takes changes how many scores are looked at, and no decision.
void ranking::choose_levels() const {
    constexpr uint32_t SAMPLE = 2048;
    constexpr float    LEVELS_PER_OCTAVE = 10;
    std::array<uint32_t, 1 << KEY_BITS> counts = {};
    const uint32_t every = std::max(1u, n_tokens() / SAMPLE);
    uint32_t n = 0, above = 0;
    for (uint32_t i = 0; i < n_tokens(); i += every) {
        counts[key_of(scores[i])]++;
        n++;
    }
    uint8_t level = LEVELS - 1;
    least_key.fill(1u << KEY_BITS);
    for (uint32_t key = 1u << KEY_BITS; key-- > 0; ) {
        if (counts[key]) {
            above += counts[key];
            level = uint8_t(std::min(float(level), LEVELS_PER_OCTAVE*std::log2(float(n) / float(above))));
        }
        level_by_key[key] = key ? level : 0;
        least_key[level_by_key[key]] = key;
    }
    for (uint32_t l = LEVELS - 1; l-- > 0; ) { // a level that no key has begins where the next one does
        least_key[l] = std::min(least_key[l], least_key[l + 1]);
    }
}

void ranking::place_tokens() const {
    constexpr uint32_t WORDS = 8; // at a time: a line of the processor's cache
    stride = (n_tokens() + 64*WORDS - 1) / (64*WORDS)*WORDS;
    upward.resize(size_t(LEVELS)*stride);
    for (uint32_t first = 0; first < stride; first += WORDS) {
        uint64_t on[LEVELS][WORDS] = {}, so_far[WORDS] = {};
        const uint32_t end = std::min(n_tokens() - first*64, 64*WORDS);
        for (uint32_t i = 0; i < end; ++i) {
            on[level_by_key[key_of(scores[first*64 + i])]][i / 64] |= uint64_t(1) << (i % 64);
        }
        for (uint32_t level = LEVELS; level-- > 0; ) {
            uint64_t * to = upward.data() + size_t(level)*stride + first;
            for (uint32_t w = 0; w < WORDS; ++w) {
                to[w] = so_far[w] |= on[level][w];
            }
        }
    }
}

void ranking::place_blocks() const {
    blocks.clear();
    n_sorted = 0;
    for (uint32_t begin = 0; begin < n_tokens(); begin += RECALL_BLOCK) {
        float peak = 0;
        for (uint32_t i = begin; i < std::min(n_tokens(), begin + RECALL_BLOCK); ++i) {
            peak = std::max(peak, peaks[i]);
        }
        if (peak > 0) {
            blocks.push_back(uint64_t(bits_of(peak)) << 32 | begin);
        }
    }
}

// As far as somebody asks.
ranking::block ranking::best_block(size_t k) const {
    survey();
    if (k >= blocks.size()) {
        return { 0, 0 };
    }
    while (k >= n_sorted) {
        const size_t end = std::min(blocks.size(), std::max<size_t>(64, 2*n_sorted));
        const auto at = [&](size_t i) { return blocks.begin() + std::ptrdiff_t(i); };
        if (end < blocks.size()) {
            std::nth_element(at(n_sorted), at(end), blocks.end(), std::greater<>());
        }
        std::sort(at(n_sorted), at(end), std::greater<>());
        for (; n_sorted < end; ++n_sorted) {
            const auto first = peaks.begin() + uint32_t(blocks[n_sorted]), last = peaks.begin() + std::min(n_tokens(), uint32_t(blocks[n_sorted]) + RECALL_BLOCK);
            blocks[n_sorted] += uint64_t(std::max_element(first, last) - first);
        }
    }
    return { float_of(uint32_t(blocks[k] >> 32)), uint32_t(blocks[k]) };
}

} // namespace asrkf
