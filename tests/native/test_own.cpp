// The attention of each layer over its own pool, from graphs, against the formula.
#include "check.h"
#include "delaying.h"

#include "scoring/own_attention.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>

using namespace asrkf;

namespace {

struct shape {
    int64_t   head, n_head, n_head_kv;
    ggml_type type;
    uint32_t  n_seqs;
    float     soft_cap;
};

// Layers 0 and 2 in set 0, layers 1 and 3 in set 1, with keys as a cache has them and queries as a model's graph has.
struct scene {
    scene(const shape & s, uint32_t seed) : s(s), random(seed), cpu(ggml_backend_cpu_init()), holder(ggml_init({ 64*ggml_tensor_overhead(), nullptr, true })) {
        for (uint32_t il = 0; il < 4; ++il) {
            const uint32_t set = il % 2;
            layers.push_back({ { il, s.head, s.n_head, s.n_head_kv, ggml_backend_cpu_buffer_type() }, s.type, set, n_cells[set] });
            keys.push_back(ggml_new_tensor_2d(holder.get(), s.type, s.head*s.n_head_kv, n_cells[set]));
        }
        own = std::make_unique<own_attention>(layers, s.n_seqs, s.soft_cap, false);
        memory.reset(ggml_backend_alloc_ctx_tensors(holder.get(), cpu.get()));
        for (ggml_tensor * k : keys) {
            stored.push_back(fill(k));
        }
        own->attach({ cpu.get() }, keys);
    }

    std::vector<float> normal(size_t n, float deviation) {
        std::normal_distribution<float> distribution(0, deviation);
        std::vector<float> values(n);
        for (float & v : values) {
            v = distribution(random);
        }
        return values;
    }

    // Random values of the tensor's type; returns them as the type has them.
    std::vector<float> fill(ggml_tensor * t) {
        std::vector<float> values = normal(size_t(ggml_nelements(t)), 1);
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        ggml_quantize_chunk(t->type, values.data(), bytes.data(), 0, t->ne[1], t->ne[0], nullptr);
        ggml_backend_tensor_set(t, bytes.data(), 0, bytes.size());
        if (t->type != GGML_TYPE_F32) {
            ggml_get_type_traits(t->type)->to_float(bytes.data(), values.data(), int64_t(values.size()));
        }
        return values;
    }

    // A step of the model: its queries, and which of its tokens are the last of each sequence.
    void step(uint32_t n_tokens, const std::vector<int32_t> & last) {
        ggml_context_ptr ctx(ggml_init({ 256*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        ggml_cgraph * nodes = ggml_new_graph(ctx.get());
        ggml_tensor * input = own->new_input(ctx.get());
        CHECK((input != nullptr) == (s.n_seqs > 1));
        std::vector<ggml_tensor *> q;
        for (size_t i = 0; i < layers.size(); ++i) {
            q.push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, s.head, s.n_head, n_tokens));
            ggml_set_input(q.back());
            own->build(ctx.get(), nodes, input, i, q.back(), scale());
        }
        ggml_backend_buffer_ptr room(ggml_backend_alloc_ctx_tensors(ctx.get(), cpu.get()));
        queries.assign(layers.size(), {});
        for (size_t i = 0; i < layers.size(); ++i) {
            const std::vector<float> values = normal(size_t(ggml_nelements(q[i])), 2);
            ggml_backend_tensor_set(q[i], values.data(), 0, ggml_nbytes(q[i]));
            for (const int32_t t : last) {
                const auto from = values.begin() + int64_t(t)*s.head*s.n_head;
                queries[i].emplace_back(from, from + s.head*s.n_head);
            }
        }
        if (input) {
            ggml_backend_tensor_set(input, last.data(), 0, ggml_nbytes(input));
        }
        CHECK(ggml_backend_graph_compute(cpu.get(), nodes) == GGML_STATUS_SUCCESS);
    }

    float scale() const { return 1 / std::sqrt(float(s.head)); }

    // Each cell of the set, from the formula.
    std::vector<double> expected(uint32_t set, const own_attention::inputs & in) const {
        std::vector<double> mean(n_cells[set], 0);
        for (size_t i = 0; i < layers.size(); ++i) {
            for (size_t n = 0; layers[i].set == set && n < in.seqs.size(); ++n) {
                for (int64_t h = 0; h < s.n_head; ++h) {
                    std::vector<double> weights(n_cells[set]);
                    double sum = 0;
                    for (size_t c = 0; c < n_cells[set]; ++c) {
                        double product = 0;
                        for (int64_t d = 0; d < s.head; ++d) {
                            product += double(queries[i][size_t(in.seqs[n])][size_t(h*s.head + d)])
                                * double(stored[i][c*size_t(s.head*s.n_head_kv) + size_t(h / (s.n_head / s.n_head_kv)*s.head + d)]);
                        }
                        product *= double(scale());
                        product = s.soft_cap > 0 ? double(s.soft_cap)*std::tanh(product / double(s.soft_cap)) : product;
                        sum += weights[c] = std::exp(product + double(in.masks[set][n*n_cells[set] + c]));
                    }
                    for (size_t c = 0; c < n_cells[set]; ++c) {
                        mean[c] += weights[c] / sum / double(2*s.n_head*int64_t(in.seqs.size()));
                    }
                }
            }
        }
        return mean;
    }

    // What these sequences see, at random.
    own_attention::inputs asked(const std::vector<int32_t> & seqs) {
        own_attention::inputs in = { seqs, {} };
        for (const uint32_t n : n_cells) {
            in.masks.emplace_back(n*seqs.size());
            for (float & seen : in.masks.back()) {
                seen = random() % 3 ? 0 : -INFINITY;
            }
        }
        return in;
    }

    const std::vector<uint32_t> n_cells = { 96, 40 };
    const shape s;
    std::mt19937 random;
    ggml_backend_ptr cpu;
    ggml_context_ptr holder;
    std::vector<own_layer> layers;
    std::vector<ggml_tensor *> keys;
    ggml_backend_buffer_ptr memory;
    std::vector<std::vector<float>> stored;               // by layer
    std::vector<std::vector<std::vector<float>>> queries; // by layer and sequence, of the last step
    std::unique_ptr<own_attention> own;
};

void compare(scene & a, const std::vector<int32_t> & seqs) {
    const own_attention::inputs in = a.asked(seqs);
    a.own->prepare(uint32_t(seqs.size()));
    a.own->run(in);
    a.own->wait();
    for (uint32_t set = 0; set < 2; ++set) {
        const std::vector<double> expected = a.expected(set, in);
        const std::vector<float> & found = a.own->of_set(set);
        CHECK(found.size() == expected.size());
        double sum = 0;
        for (size_t c = 0; c < expected.size(); ++c) {
            // the CPU takes queries to the type's own (8 bits for quantised keys)
            CHECK(std::fabs(double(found[c]) - expected[c]) <= 1e-6 + (a.s.type == GGML_TYPE_F32 ? 1e-4 : 0.03)*expected[c]);
            sum += double(found[c]);
        }
        CHECK(std::fabs(sum - 1) < 1e-3);
    }
}

} // namespace

TEST(formula, "what a layer's newest query attends to in its pool, averaged over heads and the layers of a set") {
    uint32_t seed = 1;
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const shape & s : { shape{ 64, 9, 3, type, 1, 0 }, shape{ 96, 4, 4, type, 1, 0 }, shape{ 128, 8, 1, type, 1, 30 } }) {
            scene a(s, seed++);
            for (const uint32_t n_tokens : { 5u, 1u, 1u }) { // each step's replaces the one before
                a.step(n_tokens, { int32_t(n_tokens) - 1 });
                compare(a, { 0 });
            }
        }
    }
}

TEST(sequences, "each of several sequences asks with the last query that a step brought it, and sees its own cells") {
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16 }) {
        scene a({ 64, 6, 2, type, 3, 0 }, 7);
        a.step(6, { 5, 0, 3 });
        compare(a, { 0, 2 });
        compare(a, { 1 });
        a.step(3, { 0, 1, 2 });
        compare(a, { 2, 0, 1 });
    }
}

TEST(sizes, "what is reserved is what is allocated, and a trial counts it without allocating") {
    scene a({ 64, 9, 3, GGML_TYPE_F16, 2, 0 }, 3);
    const own_attention trial(a.layers, 2, 0, true);
    CHECK(trial.kept_bytes()[0].second == a.own->kept_bytes()[0].second);
    CHECK(trial.room_bytes()[0].second <= a.own->room_bytes()[0].second);
    CHECK(a.own->room_bytes()[0].second <= trial.room_bytes()[0].second + 4096);
    CHECK(a.own->kept_bytes()[0].second >= 4*2*64*9*sizeof(float));
}

TEST(lacking, "a device that lacks an operation is refused, with its name, the operation's and the type's; no memory is left behind") {
    delaying_device device;
    device.memory.device->iface.supports_op = [](ggml_backend_dev_t, const ggml_tensor * op) {
        return op->op != GGML_OP_MUL_MAT || !ggml_is_quantized(op->src[0]->type);
    };
    const auto refusal = [&](ggml_type type, bool no_alloc) -> std::string {
        std::vector<own_layer> layers = scene({ 64, 9, 3, type, 1, 0 }, 4).layers;
        layers[1].buft = &device.memory;
        try {
            own_attention(layers, 1, 0, no_alloc);
        } catch (const error & e) {
            CHECK(e.status == ASRKF_UNSUPPORTED);
            return e.what();
        }
        return "";
    };
    for (const bool no_alloc : { false, true }) {
        CHECK(refusal(GGML_TYPE_Q8_0, no_alloc) == "delaying lacks MUL_MAT of q8_0");
        CHECK(refusal(GGML_TYPE_F16, no_alloc).empty());
    }
}

int main() { return run_all_tests(); }
