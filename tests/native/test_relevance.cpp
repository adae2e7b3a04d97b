// The graph's relevance branch against a scalar oracle.
#include "check.h"

#include "relevance.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <random>

using namespace asrkf;

namespace {

struct shape { int64_t head, n_head, n_head_kv, n_kv, n_tokens; uint32_t n_queries; float soft_cap; };

std::vector<float> oracle(const shape & s, const std::vector<float> & q, const std::vector<float> & k, const std::vector<float> & mask,
        float scale, score_kind kind) {
    std::vector<double> sum(size_t(s.n_kv), 0.0);
    const int64_t n_q = std::min<int64_t>(s.n_queries, s.n_tokens);
    for (int64_t t = s.n_tokens - n_q; t < s.n_tokens; ++t) {
        for (int64_t h = 0; h < s.n_head; ++h) {
            const int64_t h_kv = h / (s.n_head / s.n_head_kv);
            std::vector<double> logit(size_t(s.n_kv), 0.0);
            for (int64_t c = 0; c < s.n_kv; ++c) {
                double dot = 0;
                for (int64_t d = 0; d < s.head; ++d) {
                    dot += double(q[size_t((t*s.n_head + h)*s.head + d)]) * k[size_t((c*s.n_head_kv + h_kv)*s.head + d)];
                }
                logit[size_t(c)] = dot*scale;
            }
            if (kind == SCORE_MAGNITUDE) {
                for (int64_t c = 0; c < s.n_kv; ++c) {
                    sum[size_t(c)] += std::fabs(logit[size_t(c)]);
                }
                continue;
            }
            double top = -INFINITY, total = 0;
            for (int64_t c = 0; c < s.n_kv; ++c) {
                double & x = logit[size_t(c)];
                x = (s.soft_cap > 0 ? s.soft_cap*std::tanh(x/s.soft_cap) : x) + mask[size_t(t*s.n_kv + c)];
                top = std::max(top, x);
            }
            for (double & x : logit) {
                total += x = std::exp(x - top);
            }
            for (int64_t c = 0; c < s.n_kv; ++c) {
                sum[size_t(c)] += logit[size_t(c)] / total;
            }
        }
    }
    std::vector<float> result;
    for (const double x : sum) {
        result.push_back(float(x / double(n_q*s.n_head)));
    }
    return result;
}

void compare(const shape & s, ggml_type type_k, score_kind kind) {
    std::mt19937 random(42);
    std::normal_distribution<float> normal;
    const auto values = [&](int64_t n) {
        std::vector<float> v(size_t(n), 0.0f);
        for (float & x : v) {
            x = normal(random);
        }
        return v;
    };
    const auto q = values(s.head*s.n_head*s.n_tokens);
    auto k = values(s.head*s.n_head_kv*s.n_kv);
    std::vector<float> mask(size_t(s.n_kv*s.n_tokens), 0.0f);
    for (int64_t t = 0; t < s.n_tokens; ++t) { // causal, with holes: empty cells
        for (int64_t c = 0; c < s.n_kv; ++c) {
            if (c % 5 == 3 || c > s.n_kv - s.n_tokens + t) {
                mask[size_t(t*s.n_kv + c)] = -INFINITY;
            }
        }
    }
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ggml_init_params params = { 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr holder(ggml_init(params));
    ggml_context * ctx = holder.get();
    ggml_tensor * tq = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.head, s.n_head, s.n_tokens);
    ggml_tensor * tk = ggml_new_tensor_3d(ctx, type_k, s.head, s.n_head_kv, s.n_kv);
    ggml_tensor * tm = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, s.n_kv, s.n_tokens);
    const float scale = 1.0f/std::sqrt(float(s.head));
    for (ggml_tensor * t : { tq, tk, tm }) {
        ggml_set_input(t);
    }
    ggml_tensor * out = build_relevance(ctx, { tq, tk, tm, scale, s.soft_cap }, kind, s.n_queries);
    ggml_set_output(out);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, backend.get()));

    ggml_backend_tensor_set(tq, q.data(), 0, ggml_nbytes(tq));
    std::vector<uint8_t> stored(ggml_nbytes(tk));
    ggml_quantize_chunk(type_k, k.data(), stored.data(), 0, s.n_kv, s.head*s.n_head_kv, nullptr);
    ggml_backend_tensor_set(tk, stored.data(), 0, stored.size());
    ggml_get_type_traits(type_k)->to_float(stored.data(), k.data(), int64_t(k.size())); // the oracle sees what is stored
    std::vector<ggml_fp16_t> half(mask.size());
    ggml_fp32_to_fp16_row(mask.data(), half.data(), int64_t(mask.size()));
    ggml_backend_tensor_set(tm, half.data(), 0, ggml_nbytes(tm));

    CHECK(ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS);
    std::vector<float> found(size_t(s.n_kv));
    CHECK(out->ne[0] == s.n_kv && ggml_nelements(out) == s.n_kv);
    ggml_backend_tensor_get(out, found.data(), 0, ggml_nbytes(out));
    const auto expected = oracle(s, q, k, mask, scale, kind);
    // ggml rounds q to the type that K's dot product wants: F16 or Q8_0
    const double tolerance = type_k == GGML_TYPE_F16 ? 2e-3 : 2e-2;
    double worst = 0, largest = 0, sum = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        worst   = std::max(worst, double(std::fabs(found[i] - expected[i])));
        largest = std::max(largest, double(std::fabs(expected[i])));
        sum += found[i];
    }
    CHECK(worst <= tolerance*largest);
    if (kind == SCORE_ATTENTION) {
        CHECK(std::fabs(sum - 1) < 1e-3);
        CHECK(found[3] == 0); // an empty cell
    }
}

} // namespace

TEST(attention, "attention probability, averaged over heads and the last queries, GQA and soft cap") {
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        compare({ 64, 9, 3, 256, 1, 8, 0 }, type, SCORE_ATTENTION);
        compare({ 64, 9, 3, 256, 20, 8, 0 }, type, SCORE_ATTENTION);
        compare({ 128, 32, 8, 512, 3, 8, 0 }, type, SCORE_ATTENTION);
        compare({ 64, 4, 4, 256, 5, 2, 30 }, type, SCORE_ATTENTION);
    }
}

TEST(magnitude, "mean |q.k|, as published") {
    compare({ 64, 9, 3, 256, 1, 1, 0 }, GGML_TYPE_F16, SCORE_MAGNITUDE);
    compare({ 64, 9, 3, 256, 6, 4, 0 }, GGML_TYPE_Q8_0, SCORE_MAGNITUDE);
}

int main() { return run_all_tests(); }
