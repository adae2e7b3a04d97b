// Index and rings as a model's graph writes them, and the scoring graph, against a scalar oracle over several steps.
#include "check.h"

#include "scoring/query_rings.h"
#include "scoring/device_scorers.h"
#include "scoring/scoring_graph.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

using namespace asrkf;

namespace {

struct shape { int64_t head, n_head, n_head_kv; uint32_t n_layers, n_queries; float soft_cap; };

constexpr uint32_t N_ROWS = 256;

// What the branch must find, in plain loops over everything that was ever given to it.
struct oracle {
    shape s;
    std::vector<std::vector<std::vector<float>>> keys;    // [layer][row] head*n_head_kv
    std::vector<std::vector<std::vector<float>>> queries; // [layer][ring row] head*n_head
    std::vector<int32_t> row_pos, ring_pos;               // -1: none

    // missed: what each head of the layer gives frozen rows
    void scores(score_kind kind, bool prompt_end, uint32_t layer, float scale, std::vector<double> & mean, std::vector<double> & peak,
            const std::vector<float> & frozen, std::vector<double> & missed) const {
        const uint32_t first = prompt_end ? s.n_queries : 0, n = prompt_end ? PROMPT_END_QUERIES : s.n_queries;
        std::vector<std::vector<double>> by_head(size_t(s.n_head), std::vector<double>(N_ROWS, 0));
        const size_t n_before = missed.size();
        missed.resize(n_before + size_t(s.n_head));
        const auto add = [&](int64_t h, uint32_t r, double x) {
            mean[r] += x / double(n*s.n_head);
            missed[n_before + size_t(h)] += x*frozen[(layer % 2)*N_ROWS + r] / n;
            double & of_head = by_head[size_t(h)][r];
            of_head = prompt_end ? std::max(of_head, x) : of_head + x/n;
            peak[r] = std::max(peak[r], of_head);
        };
        for (uint32_t q = first; q < first + n; ++q) {
            for (int64_t h = 0; h < s.n_head; ++h) {
                const int64_t h_kv = h / (s.n_head / s.n_head_kv);
                std::vector<double> x(N_ROWS, -INFINITY);
                double top = -INFINITY, total = 0;
                for (uint32_t r = 0; r < N_ROWS; ++r) {
                    double dot = 0;
                    for (int64_t d = 0; d < s.head; ++d) {
                        dot += double(queries[layer][q][size_t(h*s.head + d)])*keys[layer][r][size_t(h_kv*s.head + d)];
                    }
                    dot *= scale;
                    if (kind == SCORE_MAGNITUDE) {
                        add(h, r, std::fabs(dot));
                    } else if (row_pos[r] >= 0 && row_pos[r] <= ring_pos[q]) {
                        x[r] = s.soft_cap > 0 ? s.soft_cap*std::tanh(dot / s.soft_cap) : dot;
                        top  = std::max(top, x[r]);
                    }
                }
                if (kind == SCORE_MAGNITUDE) {
                    continue;
                }
                for (double & v : x) {
                    total += v = std::exp(v - top);
                }
                for (uint32_t r = 0; r < N_ROWS; ++r) {
                    add(h, r, x[r] / total);
                }
            }
        }
    }
};

constexpr uint32_t FIRST_RING_ROW = 5; // those before are another sequence's

void compare(const shape & s, ggml_type type, score_kind kind, bool prompt_end = false) {
    const uint32_t n_kept_rows = s.n_queries + PROMPT_END_QUERIES;
    std::mt19937 random(42);
    std::normal_distribution<float> normal;
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    std::vector<scoring_layer> layers;
    for (uint32_t i = 0; i < s.n_layers; ++i) {
        layers.push_back({ { i*2, s.head, s.n_head, s.n_head_kv, ggml_backend_get_default_buffer_type(backend.get()) }, i % 2 });
    }
    relevance branch_of(layers, N_ROWS, 1, FIRST_RING_ROW + n_kept_rows, type, kind, s.soft_cap, false);
    const scoring_shape shape = { N_ROWS, prompt_end ? PROMPT_END_QUERIES : s.n_queries, prompt_end, false };
    device_scorers scorers(branch_of, { shape }, false);
    scorers.attach({ backend.get() });
    const size_t reserved_bytes = scorers.device_bytes();
    CHECK(branch_of.device_bytes() >= s.n_layers*(N_ROWS*ggml_row_size(type, s.head*s.n_head_kv) + n_kept_rows*s.n_head*s.head*sizeof(float)));

    oracle o = { s, {}, {}, std::vector<int32_t>(N_ROWS, -1), {} };
    query_rings rings(s.n_queries, FIRST_RING_ROW);
    o.keys.assign(s.n_layers, std::vector<std::vector<float>>(N_ROWS, std::vector<float>(size_t(s.head*s.n_head_kv), 0)));
    o.queries.assign(s.n_layers, std::vector<std::vector<float>>(n_kept_rows, std::vector<float>(size_t(s.head*s.n_head), 0)));
    const float scale = 1.0f/std::sqrt(float(s.head));
    int32_t pos = 0;
    for (const uint32_t n_tokens : { 40u, 1u, 3u, 20u, 1u }) { // the last one scores
        const bool scoring = pos > 60;
        ggml_init_params params = { 2048*ggml_tensor_overhead() + ggml_graph_overhead_custom(4096, false), nullptr, true };
        ggml_context_ptr holder(ggml_init(params));
        ggml_context * ctx = holder.get();
        ggml_cgraph * graph = ggml_new_graph_custom(ctx, 4096, false);
        relevance::branch b = branch_of.new_branch(ctx, { n_tokens, n_tokens, query_rings::n_kept(n_tokens, s.n_queries) });
        std::vector<ggml_tensor *> tq, tk;
        for (uint32_t i = 0; i < s.n_layers; ++i) {
            tq.push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.head, s.n_head, n_tokens));
            tk.push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.head, s.n_head_kv, n_tokens));
            branch_of.build(ctx, graph, b, i, tq[i], tk[i], scale);
        }
        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, backend.get()));

        std::vector<int64_t> rows, query_rows;
        std::vector<int32_t> kept;
        for (uint32_t i = 0; i < n_tokens; ++i) {
            rows.push_back((pos + int64_t(i))*3 % N_ROWS); // rows are in no order
            o.row_pos[size_t(rows.back())] = pos + int32_t(i);
        }
        std::vector<int32_t> step_pos;
        for (uint32_t i = 0; i < n_tokens; ++i) {
            step_pos.push_back(pos + int32_t(i));
        }
        rings.keep(step_pos, kept, query_rows);
        CHECK(kept.size() == size_t(ggml_nelements(b.queries)) && query_rows.size() == kept.size());
        const auto step_ring = rings.positions(askers::of_steps);
        o.ring_pos = rings.positions(askers::prompt_end);
        o.ring_pos.insert(o.ring_pos.begin(), step_ring.begin(), step_ring.end());
        for (uint32_t i = 0; i < s.n_layers; ++i) {
            std::vector<float> q(size_t(s.head*s.n_head)*n_tokens), k(size_t(s.head*s.n_head_kv)*n_tokens);
            for (float & x : q) { x = normal(random); }
            for (float & x : k) { x = normal(random); }
            ggml_backend_tensor_set(tq[i], q.data(), 0, ggml_nbytes(tq[i]));
            ggml_backend_tensor_set(tk[i], k.data(), 0, ggml_nbytes(tk[i]));
            const size_t width = size_t(s.head*s.n_head_kv);
            for (uint32_t t = 0; t < n_tokens; ++t) { // the oracle sees what is stored
                std::vector<uint8_t> stored(ggml_row_size(type, int64_t(width)));
                ggml_quantize_chunk(type, k.data() + t*width, stored.data(), 0, 1, int64_t(width), nullptr);
                ggml_get_type_traits(type)->to_float(stored.data(), o.keys[i][size_t(rows[t])].data(), int64_t(width));
            }
            for (size_t t = 0; t < kept.size(); ++t) {
                const float * from = q.data() + size_t(kept[t])*size_t(s.head*s.n_head);
                o.queries[i][size_t(query_rows[t]) - FIRST_RING_ROW].assign(from, from + s.head*s.n_head);
            }
        }
        ggml_backend_tensor_set(b.rows, rows.data(), 0, ggml_nbytes(b.rows));
        ggml_backend_tensor_set(b.queries, kept.data(), 0, ggml_nbytes(b.queries));
        ggml_backend_tensor_set(b.query_rows, query_rows.data(), 0, ggml_nbytes(b.query_rows));
        CHECK(ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS);
        pos += int32_t(n_tokens);
        if (!scoring) {
            continue;
        }
        scoring_inputs in;
        in.scoring = rings.scoring_rows(prompt_end ? askers::prompt_end : askers::of_steps);
        std::vector<float> frozen(2*N_ROWS);
        for (float & x : frozen) { x = float(random() % 3) / 2; }
        if (kind == SCORE_ATTENTION) {
            in.frozen.assign(frozen.begin(), frozen.begin() + N_ROWS*branch_of.n_sets());
        }
        if (branch_of.has_mask(shape)) {
            const auto scoring_pos = rings.positions(prompt_end ? askers::prompt_end : askers::of_steps);
            in.mask.assign(size_t(N_ROWS)*scoring_pos.size(), -INFINITY);
            for (uint32_t r = 0; r < N_ROWS; ++r) {
                for (size_t i = 0; i < scoring_pos.size(); ++i) {
                    if (o.row_pos[r] >= 0 && o.row_pos[r] <= scoring_pos[i]) {
                        in.mask[i*N_ROWS + r] = 0;
                    }
                }
            }
        }
        std::vector<float> out(2*N_ROWS), missed(branch_of.n_heads(), -1);
        scorers.prepare(shape);
        scorers.run(in, out.data(), missed.data());
        scorers.wait();
        CHECK(scorers.device_bytes() == reserved_bytes);
        // ggml rounds q to the type that the index's dot product wants: F16 or Q8_0
        const double tolerance = type == GGML_TYPE_F16 ? 2e-3 : 2e-2;
        const auto check = [&](const float * found, const std::vector<double> & expected) {
            double worst = 0, largest = 0;
            for (uint32_t r = 0; r < N_ROWS; ++r) {
                worst   = std::max(worst, std::fabs(found[r] - expected[r]));
                largest = std::max(largest, expected[r]);
            }
            CHECK(largest > 0 && worst <= tolerance*largest);
        };
        std::vector<double> mean(N_ROWS, 0), peak(N_ROWS, 0), expected_missed;
        double sum = 0;
        for (uint32_t i = 0; i < s.n_layers; ++i) {
            o.scores(kind, prompt_end, i, scale, mean, peak, frozen, expected_missed);
        }
        for (double & x : mean) {
            sum += x /= double(s.n_layers);
        }
        check(out.data(), mean);
        check(out.data() + N_ROWS, peak);
        if (kind == SCORE_ATTENTION) {
            CHECK(std::fabs(sum - 1) < 1e-6);
            CHECK(missed.size() == expected_missed.size());
            for (size_t h = 0; h < missed.size(); ++h) {
                CHECK(std::fabs(missed[h] - expected_missed[h]) < tolerance);
            }
        }
    }
}

// Rows that are means of the keys of 16 tokens, over steps of all sizes and a cut within a block.
void compare_means(bool cut) {
    constexpr uint32_t HEAD = 32, PER_ROW = 16;
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    relevance branch_of({ { 0, HEAD, 1, 1, ggml_backend_get_default_buffer_type(backend.get()) } }, N_ROWS, PER_ROW, 1 + PROMPT_END_QUERIES, GGML_TYPE_F16, SCORE_ATTENTION, 0, false);
    const scoring_shape shape = { N_ROWS, 1, false, false };
    device_scorers scorers(branch_of, { shape }, false);
    scorers.attach({ backend.get() });
    index_rows index(N_ROWS, PER_ROW);
    query_rings rings(1, 0);
    std::vector<uint32_t> records; // by token: numbers in no order
    seen_rows seen;
    std::vector<std::vector<float>> keys; // by token
    std::vector<std::vector<double>> stored(N_ROWS, std::vector<double>(HEAD, 0)); // by row, as relevance.cpp says
    std::vector<int32_t> positions;
    std::vector<float> query(HEAD);
    const auto step = [&](uint32_t n, bool again) {
        const uint32_t begin = uint32_t(records.size()) - (again ? n : 0);
        ggml_init_params params = { 256*ggml_tensor_overhead() + ggml_graph_overhead_custom(256, false), nullptr, true };
        ggml_context_ptr holder(ggml_init(params));
        ggml_context * ctx = holder.get();
        ggml_cgraph * graph = ggml_new_graph_custom(ctx, 256, false);
        relevance::branch b = branch_of.new_branch(ctx, { n, branch_of.n_written(n), query_rings::n_kept(n, 1) });
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, HEAD, 1, n), * k = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, HEAD, 1, n);
        branch_of.build(ctx, graph, b, 0, q, k, 1.0f);
        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, backend.get()));
        std::vector<float> values;
        for (uint32_t i = 0; i < n; ++i) {
            if (!again) {
                const int64_t after = records.empty() ? -1 : int64_t(records.back());
                records.push_back(uint32_t(records.size()*37 % 401));
                index.append(records.back(), after);
                positions.push_back(positions.empty() ? 5 : positions.back() + 1);
                keys.emplace_back(HEAD);
                for (float & x : keys.back()) { x = normal(random); }
            }
            values.insert(values.end(), keys[begin + i].begin(), keys[begin + i].end());
        }
        ggml_backend_tensor_set(k, values.data(), 0, ggml_nbytes(k));
        for (float & x : query) { x = normal(random); }
        values.clear();
        for (uint32_t i = 0; i < n; ++i) {
            values.insert(values.end(), query.begin(), query.end());
        }
        ggml_backend_tensor_set(q, values.data(), 0, ggml_nbytes(q));
        for (uint32_t i = begin; i < begin + n; ) {
            const uint32_t row = index[records[i]], count = index.tokens_of(row);
            std::vector<double> sum(HEAD, 0);
            uint32_t m = 0;
            for (; i < begin + n && index[records[i]] == row; ++i, ++m) {
                for (uint32_t d = 0; d < HEAD; ++d) { sum[d] += keys[i][d]; }
            }
            for (uint32_t d = 0; d < HEAD; ++d) {
                stored[row][d] = stored[row][d]*(1 - double(m)/count) + sum[d]/count;
            }
        }
        std::vector<int32_t> kept;
        std::vector<int64_t> query_rows;
        rings.keep(std::vector<int32_t>(positions.begin() + begin, positions.end()), kept, query_rows);
        ggml_backend_tensor_set(b.queries, kept.data(), 0, ggml_nbytes(b.queries));
        ggml_backend_tensor_set(b.query_rows, query_rows.data(), 0, ggml_nbytes(b.query_rows));
        branch_of.set_written(b, branch_of.written_by(b.shape, index, std::vector<uint32_t>(records.begin() + begin, records.end())));
        CHECK(ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS);

        seen.update(index, records, {});
        scoring_inputs in = { rings.scoring_rows(askers::of_steps), {}, std::vector<float>(N_ROWS, 1) };
        CHECK(rings.positions(askers::of_steps)[0] == positions.back());
        branch_of.write_mask(shape, { { &seen, uint32_t(records.size()) } }, in.mask);
        std::vector<float> found(2*N_ROWS);
        float missed = 0;
        scorers.prepare(shape);
        scorers.run(in, found.data(), &missed);
        scorers.wait();
        CHECK(std::fabs(missed - 1) < 1e-5); // everything is frozen
        return found;
    };
    const auto expected = [&] {
        std::vector<double> weight(N_ROWS, 0);
        double total = 0;
        for (uint32_t row = 0; row < N_ROWS; ++row) {
            const double n = index.tokens_of(row);
            double dot = 0;
            for (uint32_t d = 0; d < HEAD; ++d) {
                dot += double(query[d])*stored[row][d];
            }
            if (n > 0) {
                total += weight[row] = n*std::exp(dot); // a block counts as often as it has tokens
            }
        }
        for (double & x : weight) { x /= total; }
        return weight;
    };
    const auto compared = [&](const std::vector<float> & found) {
        const auto wanted = expected();
        double worst = 0;
        for (uint32_t row = 0; row < N_ROWS; ++row) {
            worst = std::max(worst, std::fabs(found[row] - wanted[row]));
        }
        return worst;
    };
    const auto worst_row = [&] { // what is stored against the true means
        double worst = 0;
        for (uint32_t row = 0; row < index.n_used(); ++row) {
            for (uint32_t d = 0; d < HEAD; ++d) {
                double sum = 0;
                for (size_t i = 0; i < records.size(); ++i) {
                    sum += index[records[i]] == row ? double(keys[i][d]) : 0;
                }
                worst = std::max(worst, std::fabs(stored[row][d] - sum/index.tokens_of(row)));
            }
        }
        return worst;
    };
    for (const uint32_t n : { 40u, 1u, 1u, 70u, 16u, 3u, 1u, 15u, 1u }) {
        CHECK(compared(step(n, false)) < 2e-3);
    }
    CHECK(worst_row() < 1e-6); // in order: exact
    CHECK(index.n_used() == 10 && index.tokens_of(index[records[147]]) == 4);
    if (cut) { // the newest 13 tokens go: the row that is left with 7 keeps a share of the 9 that it lost
        for (size_t i = 148; i-- > 135; ) {
            index.release(records[i]);
        }
        records.resize(135);
        seen.clear();
        keys.resize(135);
        positions.resize(135);
        CHECK(index.tokens_of(index[records[134]]) == 7 && index.n_used() == 9);
        CHECK(compared(step(1, false)) < 2e-3);
        CHECK(worst_row() > 1e-3);
        CHECK(compared(step(8, false)) < 2e-3 && index.tokens_of(index[records[143]]) == 16);
        CHECK(compared(step(1, false)) < 2e-3 && index.tokens_of(index[records[144]]) == 1); // a row of its own: its old content is gone
    } else { // computed again: the rows that are written whole are exact, of the first one 11 of 16 tokens are new
        for (uint32_t i = 133; i < 148; ++i) {
            for (float & x : keys[i]) { x = normal(random); }
        }
        CHECK(compared(step(15, true)) < 2e-3);
        CHECK(worst_row() > 1e-3);
    }
}

} // namespace

TEST(attention, "attention probability over all tokens: mean, peak over heads; GQA and soft cap") {
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        compare({ 64, 9, 3, 3, 8, 0 }, type, SCORE_ATTENTION);
        compare({ 128, 32, 8, 2, 8, 0 }, type, SCORE_ATTENTION);
        compare({ 64, 4, 4, 2, 5, 30 }, type, SCORE_ATTENTION);
        compare({ 64, 6, 2, 2, 1, 0 }, type, SCORE_ATTENTION);
        compare({ 64, 9, 3, 2, 4, 0 }, type, SCORE_ATTENTION, true);
    }
}

TEST(magnitude, "mean |q.k|, as published") {
    compare({ 64, 9, 3, 2, 1, 0 }, GGML_TYPE_F16, SCORE_MAGNITUDE);
    compare({ 64, 9, 3, 3, 4, 0 }, GGML_TYPE_Q8_0, SCORE_MAGNITUDE);
}

TEST(mean_key, "rows that are means of 16 keys, whatever the steps; computed again, or cut") {
    compare_means(false);
    compare_means(true);
}

TEST(rings, "steps keep a few queries from all over them, and a prompt's end the newest ones") {
    query_rings rings(4, 0);
    std::vector<int32_t> tokens, step(100);
    std::vector<int64_t> rows;
    std::iota(step.begin(), step.end(), 1000);
    rings.keep(step, tokens, rows);
    CHECK(tokens.size() == 36 && tokens[0] == 24 && tokens[3] == 99 && tokens[4] == 68 && tokens[35] == 99);
    tokens.clear();
    rows.clear();
    rings.keep({ 1100, 1101 }, tokens, rows);
    CHECK((tokens == std::vector<int32_t>{ 0, 1, 0, 1 }) && (rows == std::vector<int64_t>{ 0, 1, 4, 5 }));
    CHECK((rings.positions(askers::of_steps) == std::vector<int32_t>{ 1100, 1101, 1074, 1099 }));
    auto newest = rings.positions(askers::prompt_end);
    std::sort(newest.begin(), newest.end());
    CHECK(newest.size() == PROMPT_END_QUERIES && newest.front() == 1070 && newest.back() == 1101);
    rings.forget_from(1099);
    CHECK((rings.positions(askers::of_steps) == std::vector<int32_t>{ -1, -1, 1074, -1 }));
    query_rings second(4, 36); // appends what is another sequence's, in rows of its own
    second.keep({ 7 }, tokens, rows);
    CHECK((rows == std::vector<int64_t>{ 0, 1, 4, 5, 36, 40 }) && (second.scoring_rows(askers::of_steps) == std::vector<int32_t>{ 36, 37, 38, 39 }));
    CHECK((second.scoring_rows(askers::newest) == std::vector<int32_t>{ 36 }) && (second.positions(askers::newest) == std::vector<int32_t>{ 7 }));
    CHECK((rings.scoring_rows(askers::newest) == std::vector<int32_t>{ 1 })); // the last of the four begins anew behind it
}

namespace {

// A sequence's tokens in the index, counted from the beginning for each question.
struct counted_rows {
    const index_rows & index;
    const std::vector<uint32_t> & records;

    std::vector<float> mask(uint32_t n_tokens, uint32_t n_rows) const {
        std::vector<float> result(n_rows, 0);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            result[index[records[i]]]++;
        }
        for (float & x : result) {
            x = std::log(x);
        }
        return result;
    }
    void add(const std::vector<uint64_t> & active, std::vector<float> & frozen, std::vector<float> & all) const {
        for (uint32_t i = 0; i < records.size(); ++i) {
            all[index[records[i]]]++;
            frozen[index[records[i]]] += !(active[i / 64] >> (i % 64) & 1);
        }
    }
};

// Two sequences that share tokens grow, freeze and restore, are cut back, and copy from each other.
void compare_seen(uint32_t tokens_per_row, uint32_t seed) {
    constexpr uint32_t N_SETS = 3, N_MOST = 700;
    std::mt19937 random(seed);
    index_rows index(N_MOST / tokens_per_row, tokens_per_row); // with means rows run out, and are shared
    struct { std::vector<uint32_t> records; std::vector<std::vector<uint64_t>> active; seen_rows seen; } both[2];
    std::vector<uint32_t> users(4*N_MOST, 0), free_records;
    for (uint32_t id = 0; id < users.size(); ++id) {
        free_records.push_back(id);
    }
    for (auto & s : both) {
        s.active.assign(N_SETS, std::vector<uint64_t>(N_MOST / 64 + 1, 0));
    }
    const auto put = [](std::vector<uint64_t> & set, size_t i, bool in) { set[i / 64] = (set[i / 64] & ~(uint64_t(1) << (i % 64))) | uint64_t(in) << (i % 64); };
    const auto append = [&](auto & s, uint32_t id) {
        users[id]++;
        s.records.push_back(id);
        for (auto & set : s.active) {
            put(set, s.records.size() - 1, random() % 8 != 0);
        }
    };
    const auto cut = [&](auto & s, size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
            if (--users[s.records[i]] == 0) {
                index.release(s.records[i]);
                free_records.push_back(s.records[i]);
            }
        }
        s.records.erase(s.records.begin() + std::ptrdiff_t(begin), s.records.begin() + std::ptrdiff_t(end));
        s.seen.clear();
    };
    for (int round = 0; round < 400; ++round) {
        auto & s = both[random() % 2], & other = both[&s == &both[0]];
        for (uint32_t n = random() % 30; n > 0 && s.records.size() + other.records.size() < N_MOST / 2; --n) {
            const uint32_t id = free_records.back();
            free_records.pop_back();
            index.append(id, s.records.empty() || users[s.records.back()] > 1 ? -1 : int64_t(s.records.back()));
            append(s, id);
        }
        for (uint32_t n = random() % 40; n > 0 && !s.records.empty(); --n) {
            put(s.active[random() % N_SETS], random() % s.records.size(), random() % 2);
        }
        const size_t size = s.records.size(), at = size ? random() % size : 0;
        switch (random() % 12) {
            case 0: cut(s, at, size); break;
            case 1: cut(s, at, std::min(size, at + random() % 40)); break;
            case 2:
                cut(s, 0, size);
                for (size_t i = 0; i < other.records.size() && s.records.size() + other.records.size() < N_MOST / 2; ++i) {
                    append(s, other.records[i]);
                }
                break;
            default: break;
        }
        uint32_t n_used = 0;
        for (uint32_t row = 0; row < N_MOST / tokens_per_row; ++row) {
            n_used = index.tokens_of(row) > 0 ? row + 1 : n_used;
        }
        CHECK(index.n_used() == n_used);
        const uint32_t n_rows = N_MOST / tokens_per_row;
        std::vector<const seen_rows *> scored;
        for (auto & each : both) {
            if (each.records.empty() || (scored.empty() && random() % 2)) {
                continue;
            }
            std::vector<const uint64_t *> active;
            for (const auto & set : each.active) {
                active.push_back(set.data());
            }
            each.seen.update(index, each.records, active);
            scored.push_back(&each.seen);
            const uint32_t n_tokens = uint32_t(each.records.size()) - random() % std::min<uint32_t>(5, uint32_t(each.records.size()));
            for (const uint32_t n : { n_tokens, uint32_t(each.records.size()), 0u }) {
                std::vector<float> mask(n_rows, 1);
                each.seen.write_mask(n, mask.data(), n_rows);
                CHECK(mask == (counted_rows{ index, each.records }.mask(n, n_rows)));
            }
        }
        if (scored.empty()) {
            continue;
        }
        std::vector<float> parts;
        seen_rows::write_frozen(scored, N_SETS, n_rows, parts);
        for (uint32_t set = 0; set < N_SETS; ++set) {
            std::vector<float> frozen(n_rows, 0), all(n_rows, 0);
            for (const auto & each : both) {
                if (std::find(scored.begin(), scored.end(), &each.seen) != scored.end()) {
                    counted_rows{ index, each.records }.add(each.active[set], frozen, all);
                }
            }
            for (uint32_t row = 0; row < n_rows; ++row) {
                CHECK(parts[set*n_rows + row] == frozen[row] / std::max(1.0f, all[row]));
            }
        }
    }
}

} // namespace

TEST(seen, "what is kept of the index from one scoring to the next is what a new count finds, after cuts and copies, too") {
    std::printf("     seeds 1 to 10\n");
    for (uint32_t seed = 1; seed <= 10; ++seed) {
        compare_seen(1, seed);
        compare_seen(16, seed);
    }
}

TEST(rows_in_turn, "blocks are filled in turn, rows are given back, and where none is free another takes more") {
    index_rows rows(4, 4);
    for (uint32_t i = 0; i < 16; ++i) { rows.append(i, int64_t(i) - 1); }
    CHECK(rows[0] == rows[3] && rows[3] != rows[4] && rows.n_used() == 4);
    rows.release(5); // a hole: the row has two tokens and stays
    rows.release(6);
    CHECK(rows.tokens_of(rows[4]) == 2);
    rows.append(5, 15); // no row is free
    CHECK(rows[5] == rows[15] && rows.tokens_of(rows[5]) == 5);
    rows.append(6, -1); // nor for another sequence: the row with the fewest
    CHECK(rows[6] == rows[4] && rows.tokens_of(rows[6]) == 3);
    for (uint32_t i = 0; i < 4; ++i) { rows.release(i); }
    rows.append(0, 5);
    rows.append(1, 0);
    rows.append(2, -1); // nothing that it may follow, and no row is free
    CHECK(rows[0] != rows[15] && rows[1] == rows[0] && rows[2] == rows[0] && rows.tokens_of(rows[0]) == 3);
    for (const uint32_t i : { 0u, 1u, 2u, 4u, 5u, 6u, 7u, 8u, 9u, 10u, 11u, 12u, 13u, 14u, 15u }) { rows.release(i); }
    CHECK(rows.n_used() == 0);
    index_rows single(3, 1);
    for (uint32_t i = 0; i < 3; ++i) { single.append(i, int64_t(i) - 1); CHECK(single[i] == i); }
}

namespace {

// A LLaMA-3-like index of 4,096 rows, of layers on one device.
relevance large_index(ggml_backend_dev_t dev, ggml_type type, uint32_t tokens_per_row) {
    std::vector<scoring_layer> layers;
    for (uint32_t il : { 3u, 7u }) {
        layers.push_back({ { il, 128, 32, 8, ggml_backend_dev_buffer_type(dev) } });
    }
    return relevance(layers, 4096, tokens_per_row, 40, type, SCORE_ATTENTION, 0, false);
}

// What backends ask of an operation beyond its name: rules of those that are not there to be asked.
void check_shape_rules(const ggml_tensor * node) {
    const ggml_tensor * a = node->src[0], * b = node->src[1];
    switch (node->op) {
        case GGML_OP_MUL_MAT: // Vulkan, CUDA: a quantised matrix, and what it is multiplied with
            CHECK(!ggml_is_quantized(a->type) || (a->nb[1] == ggml_row_size(a->type, a->ne[0]) && a->nb[0] == ggml_type_size(a->type)));
            CHECK(b->type == GGML_TYPE_F32 && ggml_is_contiguous(b));
            break;
        case GGML_OP_SET_ROWS:
            CHECK(a->type == GGML_TYPE_F32 && b->type == GGML_TYPE_I64 && b->ne[1] == 1 && ggml_is_contiguous_rows(a));
            break;
        case GGML_OP_GET_ROWS:
            CHECK(node->type == GGML_TYPE_F32 && b->type == GGML_TYPE_I32 && a->ne[2] == b->ne[1]);
            break;
        case GGML_OP_SOFT_MAX:
            CHECK(ggml_is_contiguous(a) && a->type == GGML_TYPE_F32 && ggml_is_contiguous(b) && b->type == GGML_TYPE_F32);
            break;
        case GGML_OP_SCALE:
        case GGML_OP_UNARY:
            CHECK(ggml_is_contiguous(a) && a->type == GGML_TYPE_F32);
            break;
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_CONCAT:
            CHECK(a->type == GGML_TYPE_F32 && b->type == GGML_TYPE_F32 && a->nb[0] == sizeof(float) && b->nb[0] == sizeof(float));
            break;
        default:
            CHECK(node->op == GGML_OP_CONT || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE);
    }
}

void check_graphs_on(ggml_backend_dev_t dev, ggml_type type, uint32_t tokens_per_row) {
    relevance kept = large_index(dev, type, tokens_per_row);
    const scoring_shape step = { 4096, 16, false, true }, prompt = { 4096, PROMPT_END_QUERIES, true, false };
    scoring_graphs graphs(parts_of(kept, { step, prompt }, false)[0]);
    const auto check = [&](ggml_cgraph * graph) {
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            const ggml_tensor * node = ggml_graph_node(graph, i);
            CHECK(ggml_backend_dev_supports_op(dev, node));
            check_shape_rules(node);
        }
    };
    for (const scoring_shape & shape : { step, prompt }) {
        graphs.prepare(shape);
        check(graphs.newest());
    }
    for (const uint32_t n : { 1u, 8u, 64u }) {
        ggml_init_params params = { 256*ggml_tensor_overhead() + ggml_graph_overhead_custom(256, false), nullptr, true };
        ggml_context_ptr holder(ggml_init(params));
        ggml_cgraph * graph = ggml_new_graph_custom(holder.get(), 256, false);
        relevance::branch b = kept.new_branch(holder.get(), { n, kept.n_written(n), query_rings::n_kept(n, 4) });
        for (size_t i = 0; i < 2; ++i) {
            kept.build(holder.get(), graph, b, i, ggml_new_tensor_3d(holder.get(), GGML_TYPE_F32, 128, 32, n),
                    ggml_new_tensor_3d(holder.get(), GGML_TYPE_F32, 128, 8, n), 1.0f);
        }
        check(graph);
    }
}

} // namespace

TEST(operations, "every node of our graphs is one that the devices compute, in shapes that the others take, too") {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            continue; // computes products alone, beside the CPU
        }
        for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_F16 }) {
            check_graphs_on(dev, type, 1);
        }
        check_graphs_on(dev, GGML_TYPE_F16, 16);
    }
}

TEST(graphs, "a size has its graph, four to an octave; the newest are kept as they are, in the room of the largest") {
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    relevance kept = large_index(ggml_backend_get_device(backend.get()), GGML_TYPE_Q4_0, 1);
    const scoring_shape largest = { 0, 4, false, false };
    scoring_graphs graphs(parts_of(kept, { largest }, false)[0]);
    const size_t reserved_bytes = graphs.device_bytes();
    CHECK(scoring_graphs(parts_of(kept, { largest }, true)[0]).device_bytes() == reserved_bytes);
    CHECK(reserved_bytes >= 4096*4*32*sizeof(float) && reserved_bytes < 3*4096*4*32*sizeof(float));
    std::vector<uint32_t> sizes;
    for (uint32_t n = 0; n <= 4096; ++n) {
        const uint32_t size = rows_to_score(n, kept.rows());
        CHECK(size >= n && (n < 2048 ? size <= std::max(256u, n + n/4 + 256) : size <= n + n/4));
        if (sizes.empty() || sizes.back() != size) {
            sizes.push_back(size);
        }
    }
    CHECK((sizes == std::vector<uint32_t>{ 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096 }));
    graphs.attach(backend.get());
    std::vector<ggml_cgraph *> seen;
    for (const uint32_t size : { 256u, 512u, 256u, 768u, 1024u, 1280u, 256u, 4096u }) {
        graphs.prepare({ size, 4, false, false });
        seen.push_back(graphs.newest());
        CHECK(graphs.device_bytes() == reserved_bytes);
    }
    CHECK(seen[0] == seen[2] && seen[0] == seen[6] && seen[0] != seen[1]);
}

TEST(failing_run, "a device that fails gives no scores") {
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    relevance kept = large_index(ggml_backend_get_device(backend.get()), GGML_TYPE_F16, 1);
    const scoring_shape shape = { 256, 4, false, false };
    device_scorers scorers(kept, { shape }, false);
    scorers.attach({ backend.get() });
    scorers.prepare(shape);
    const scoring_inputs in = { { 0, 1, 2, 3 }, std::vector<float>(256*4, 0), std::vector<float>(256, 0) };
    std::vector<float> out(2*256), missed(kept.n_heads());
    fail_scoring_in = 2;
    const auto run = [&] { return thrown([&] { scorers.run(in, out.data(), missed.data()); }); };
    CHECK(run().empty());
    CHECK(!run().empty());
    CHECK(run().empty());
    scorers.wait();
    CHECK(std::fabs(out[0]*256 - 1) < 1e-5); // empty rows: all the same
}

TEST(wrong_type, "an index type whose blocks do not divide a head is refused") {
    const std::string text = thrown([] { relevance({ { 0, 80, 4, 4, ggml_backend_cpu_buffer_type() } }, 256, 1, 8, GGML_TYPE_Q4_0, SCORE_ATTENTION, 0, true); });
    CHECK(text.find("index=f16") != std::string::npos);
}

int main() { return run_all_tests(); }
