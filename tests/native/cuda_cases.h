// The cases that every implementation of relevance must pass, their data, and what each must find: plain loops in double.
#pragma once

#include "common.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

struct relevance_case {
    const char * what;
    ggml_type    type;
    uint32_t     head, n_head, n_head_kv, n_rows, n_queries;
    uint32_t     n_sequences = 1;     // rows go round among them, and a query sees its own
    bool         magnitude   = false;
    bool         prompt_end  = false;
    float        soft_cap    = 0;
    uint32_t     n_layers    = 1;
    float        odd_key     = 0;     // an element of one row that the first query of one head sees is this (NaN, infinite)
    bool         blind       = false; // the first query sees nothing
    bool         blocks      = false; // rows stand for several tokens: their logits count as often
};

inline const std::vector<relevance_case> & relevance_cases() {
    constexpr float INF = INFINITY;
    static const std::vector<relevance_case> cases = {
        { "one row, one query, one head", GGML_TYPE_F16, 64, 1, 1, 1, 1 },
        { "fewer rows than a block has threads", GGML_TYPE_Q4_0, 64, 2, 1, 77, 3 },
        { "rows that fill blocks but for one", GGML_TYPE_Q8_0, 64, 3, 3, 127, 2 },
        { "rows one more than a block's", GGML_TYPE_Q4_0, 128, 4, 1, 129, 8 },
        { "more than one chunk", GGML_TYPE_Q4_0, 64, 4, 2, 1187, 5 },
        { "a query head a KV head", GGML_TYPE_Q8_0, 128, 2, 2, 300, 8 },
        { "three query heads a KV head", GGML_TYPE_Q4_0, 64, 9, 3, 301, 7 },
        { "four", GGML_TYPE_Q8_0, 128, 8, 2, 255, 8 },
        { "eight", GGML_TYPE_F16, 64, 8, 1, 256, 8 },
        { "heads of 80", GGML_TYPE_F16, 80, 4, 2, 203, 3 },
        { "heads of 96", GGML_TYPE_Q4_0, 96, 4, 4, 200, 3 },
        { "heads of 256", GGML_TYPE_Q8_0, 256, 4, 1, 201, 9 },
        { "heads of 256 in F16, three layers", GGML_TYPE_F16, 256, 2, 1, 130, 2, 1, false, false, 0, 3 },
        { "soft-capped logits", GGML_TYPE_Q8_0, 64, 4, 2, 222, 8, 1, false, false, 3.0f, 2 },
        { "a prompt's end", GGML_TYPE_Q4_0, 64, 6, 2, 333, 32, 1, false, true, 0, 2 },
        { "a prompt's end, soft-capped", GGML_TYPE_F16, 96, 2, 2, 140, 32, 1, false, true, 2.0f },
        { "several sequences", GGML_TYPE_Q4_0, 64, 4, 2, 419, 24, 3 },
        { "magnitudes", GGML_TYPE_Q8_0, 64, 4, 2, 211, 8, 1, true },
        { "magnitudes of several sequences", GGML_TYPE_F16, 80, 4, 1, 190, 8, 2, true, false, 0, 2 },
        { "magnitudes at a prompt's end", GGML_TYPE_Q4_0, 128, 3, 1, 150, 32, 1, true, true },
        { "rows that stand for many tokens", GGML_TYPE_F16, 64, 4, 2, 170, 8, 1, false, false, 0, 2, 0, false, true },
        { "a NaN in a key", GGML_TYPE_F16, 64, 4, 2, 150, 3, 1, false, false, 0, 1, NAN },
        { "a NaN in a key at a prompt's end", GGML_TYPE_F16, 64, 4, 2, 150, 32, 1, false, true, 0, 1, NAN },
        { "a NaN in a key, magnitudes", GGML_TYPE_F16, 64, 4, 2, 150, 3, 1, true, false, 0, 1, NAN },
        { "an infinite key", GGML_TYPE_F16, 64, 4, 2, 150, 3, 1, false, false, 0, 1, INF },
        { "a query that sees nothing", GGML_TYPE_Q4_0, 64, 4, 2, 600, 3, 1, false, false, 0, 1, 0, true },
    };
    return cases;
}

struct relevance_data {
    explicit relevance_data(const relevance_case & c) : c(c), row_bytes(ggml_row_size(c.type, c.head)) {
        std::mt19937 random(c.head*131 + c.n_rows*7 + c.n_queries);
        std::normal_distribution<float> normal;
        const uint32_t n_ring = c.n_queries + 5;
        for (uint32_t i = 0; i < c.n_queries; ++i) {
            scoring.push_back(int32_t((i*3 + 2) % n_ring)); // in no order
        }
        if (n_ring % 3 == 0) { // then the step of three would meet rows twice
            for (uint32_t i = 0; i < c.n_queries; ++i) { scoring[i] = int32_t(n_ring - 1 - i); }
        }
        for (uint32_t layer = 0; layer < c.n_layers; ++layer) {
            add_layer(random, normal, n_ring);
        }
        mask.assign(size_t(c.n_rows)*c.n_queries, 0);
        for (uint32_t q = 0; q < c.n_queries; ++q) {
            for (uint32_t r = 0; r < c.n_rows; ++r) {
                const uint32_t n_tokens = c.blocks ? 1 + r % 16 : 1;
                const bool seen = r % c.n_sequences == q % c.n_sequences && !(c.blind && q == 0) && (r == q % c.n_sequences || r % 11 != 5 || q % 2 == 0);
                mask[size_t(q)*c.n_rows + r] = c.magnitude ? float(seen) : seen ? std::log(float(n_tokens)) : -INFINITY;
            }
        }
        for (uint32_t r = 0; r < c.n_rows; ++r) {
            frozen.push_back(r % 5 == 1 || (r > 100 && r < 130) ? 1.0f : 0.0f);
        }
    }

    const relevance_case              c;
    const size_t                      row_bytes;
    std::vector<std::vector<uint8_t>> index;   // by layer: KV head by KV head, with unused bytes between them
    std::vector<std::vector<float>>   keys;    // the same elements as the index holds them
    std::vector<std::vector<float>>   ring;    // by layer: [n_ring, n_head, head]
    std::vector<int32_t>              scoring;
    std::vector<float>                mask;    // [n_queries, n_rows]
    std::vector<float>                frozen;  // [n_rows]

    size_t head_bytes() const { return c.n_rows*row_bytes + 3*row_bytes; }
    float  scale() const { return 1.0f / std::sqrt(float(c.head)); }

private:
    void add_layer(std::mt19937 & random, std::normal_distribution<float> & normal, uint32_t n_ring) {
        index.emplace_back(c.n_head_kv*head_bytes(), uint8_t(0xff)); // what lies between is NaN, if it is read
        keys.emplace_back(size_t(c.n_head_kv)*c.n_rows*c.head);
        ring.emplace_back(size_t(n_ring)*c.n_head*c.head);
        std::vector<float> row(c.head);
        for (uint32_t kv = 0; kv < c.n_head_kv; ++kv) {
            for (uint32_t r = 0; r < c.n_rows; ++r) {
                for (float & x : row) { x = 2*normal(random); }
                if (c.odd_key != 0 && kv == 0 && r == 2*c.n_sequences) { row[c.head/2] = c.odd_key; }
                uint8_t * stored = index.back().data() + kv*head_bytes() + r*row_bytes;
                ggml_quantize_chunk(c.type, row.data(), stored, 0, 1, c.head, nullptr);
                ggml_get_type_traits(c.type)->to_float(stored, keys.back().data() + (size_t(kv)*c.n_rows + r)*c.head, c.head);
            }
        }
        for (float & x : ring.back()) { x = normal(random); }
    }
};

struct relevance_result {
    std::vector<double> mean, peak;
    std::vector<double> missed; // by layer: each head
};

// One query of one head over all rows: probabilities, or magnitudes.
inline std::vector<double> scores_of(const relevance_data & d, uint32_t layer, uint32_t h, uint32_t q) {
    const relevance_case & c = d.c;
    const float * query = d.ring[layer].data() + (size_t(d.scoring[q])*c.n_head + h)*c.head;
    std::vector<double> x(c.n_rows);
    double top = -INFINITY, total = 0;
    for (uint32_t r = 0; r < c.n_rows; ++r) {
        const float * key = d.keys[layer].data() + (size_t(h / (c.n_head/c.n_head_kv))*c.n_rows + r)*c.head;
        double dot = 0;
        for (uint32_t i = 0; i < c.head; ++i) {
            dot += double(query[i])*double(key[i]);
        }
        dot *= double(d.scale());
        const double mask = double(d.mask[size_t(q)*c.n_rows + r]);
        x[r] = c.magnitude ? std::fabs(dot)*mask : (c.soft_cap > 0 ? double(c.soft_cap)*std::tanh(dot/double(c.soft_cap)) : dot) + mask;
        top  = std::isnan(x[r]) || x[r] > top ? x[r] : top;
    }
    if (c.magnitude) {
        return x;
    }
    for (double & value : x) {
        total += value = top == -INFINITY ? 0 : std::exp(value - top);
    }
    for (double & value : x) {
        value = top == -INFINITY ? 0 : value / total;
    }
    return x;
}

inline relevance_result expected_of(const relevance_data & d) {
    const relevance_case & c = d.c;
    const auto larger = [](double a, double b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); };
    relevance_result result = { std::vector<double>(c.n_rows, 0), std::vector<double>(c.n_rows, 0), {} };
    for (uint32_t layer = 0; layer < c.n_layers; ++layer) {
        for (uint32_t h = 0; h < c.n_head; ++h) {
            std::vector<double> of_head(c.n_rows, 0);
            double missed_of_head = 0;
            for (uint32_t q = 0; q < c.n_queries; ++q) {
                const std::vector<double> p = scores_of(d, layer, h, q);
                for (uint32_t r = 0; r < c.n_rows; ++r) {
                    result.mean[r] += p[r] / (double(c.n_queries)*c.n_head*c.n_layers);
                    of_head[r]     += p[r] / c.n_queries;
                    result.peak[r]  = c.prompt_end ? larger(result.peak[r], p[r]) : result.peak[r];
                    missed_of_head += p[r]*double(d.frozen[r]) / c.n_queries;
                }
            }
            for (uint32_t r = 0; r < c.n_rows && !c.prompt_end; ++r) {
                result.peak[r] = larger(result.peak[r], of_head[r]);
            }
            result.missed.push_back(missed_of_head);
        }
    }
    return result;
}

// The largest difference, relative to the largest that was expected; infinite where one is NaN and the other is not.
inline double difference(const std::vector<double> & expected, const std::vector<float> & found) {
    double worst = expected.size() == found.size() ? 0 : INFINITY, largest = 0;
    for (size_t i = 0; i < expected.size() && i < found.size(); ++i) {
        largest = std::isfinite(expected[i]) ? std::max(largest, std::fabs(expected[i])) : largest;
        if (std::isnan(expected[i]) != bool(std::isnan(found[i])) || std::isinf(expected[i]) != bool(std::isinf(found[i]))) {
            worst = INFINITY;
        } else if (std::isfinite(expected[i])) {
            worst = std::max(worst, std::fabs(expected[i] - double(found[i])));
        }
    }
    return largest > 0 ? worst / largest : worst;
}
