// The source of native/cuda/, run on a CPU (cuda_shim.h), against plain loops, and the portable graph against the same cases. No card is
// asked for, and none is spoken for.
#include "check.h"
#include "cuda_cases.h"

#include "cuda/kernels.h"
#include "policy/entropy.h"
#include "scoring/scoring_graph.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>

using namespace asrkf;

namespace {

constexpr std::array<shim::order, 3> ORDERS = { shim::order::ascending, shim::order::descending, shim::order::uneven };

struct on_card {
    std::vector<float> mean, peak, missed;
    bool operator==(const on_card & o) const {
        const auto same = [](const std::vector<float> & a, const std::vector<float> & b) { return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0); };
        return same(mean, o.mean) && same(peak, o.peak) && same(missed, o.missed);
    }
};

cuda::relevance_layer layer_of(const relevance_data & d, uint32_t i, on_card & out, std::vector<uint64_t> & scratch) {
    const relevance_case & c = d.c;
    const cuda::row_type type = c.type == GGML_TYPE_F16 ? cuda::row_type::f16 : c.type == GGML_TYPE_Q8_0 ? cuda::row_type::q8_0 : cuda::row_type::q4_0;
    scratch.resize(cuda::relevance_scratch_bytes(c.n_head, c.n_head_kv, c.n_rows, c.n_queries)/sizeof(uint64_t) + 1, 0);
    const bool with_missed = !c.magnitude;
    return { type, d.index[i].data(), d.head_bytes(), d.ring[i].data(), d.scoring.data(), d.mask.data(), with_missed ? d.frozen.data() : nullptr, c.head, c.n_head, c.n_head_kv,
        c.n_rows, c.n_queries, c.n_layers, d.scale(), c.soft_cap, c.magnitude, c.prompt_end, i == 0, out.mean.data(), out.peak.data(), with_missed ? out.missed.data() + 2*i : nullptr, scratch.data() };
}

on_card run(const relevance_data & d, std::vector<uint64_t> & scratch) {
    on_card out = { std::vector<float>(d.c.n_rows, -7), std::vector<float>(d.c.n_rows, -7), std::vector<float>(d.c.magnitude ? 0 : 2*d.c.n_layers, -7) };
    for (uint32_t i = 0; i < d.c.n_layers; ++i) {
        const cuda::failure why = cuda::add_relevance(layer_of(d, i, out, scratch), nullptr);
        CHECK(why == nullptr);
    }
    return out;
}

// Index and rings of a case, as the portable graph has them on the CPU.
struct on_cpu {
    explicit on_cpu(const relevance_data & d) : backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)), kept(layers_of(d.c), d.c.n_rows, 1, n_ring(d), d.c.type,
            d.c.magnitude ? SCORE_MAGNITUDE : SCORE_ATTENTION, d.c.soft_cap, false) {
        const relevance_case & c = d.c;
        ggml_init_params params = { 1024*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
        ggml_context_ptr ctx(ggml_init(params));
        const relevance::branch unused = kept.new_branch(ctx.get(), { 1, 1, 1 });
        for (uint32_t i = 0; i < c.n_layers; ++i) { // building is how the scale becomes known
            kept.build(ctx.get(), ggml_new_graph(ctx.get()), unused, i, ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.head, c.n_head, 1),
                    ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.head, c.n_head_kv, 1), d.scale());
            std::vector<uint8_t> rows;
            for (uint32_t kv = 0; kv < c.n_head_kv; ++kv) {
                rows.insert(rows.end(), d.index[i].begin() + std::ptrdiff_t(kv*d.head_bytes()), d.index[i].begin() + std::ptrdiff_t(kv*d.head_bytes() + c.n_rows*d.row_bytes));
            }
            kept.set_rows(i, 0, c.n_rows, rows.data());
            ggml_backend_tensor_set(kept.states()[i].ring, d.ring[i].data(), 0, d.ring[i].size()*sizeof(float));
        }
    }
    static uint32_t n_ring(const relevance_data & d) { return uint32_t(d.ring[0].size() / (size_t(d.c.n_head)*d.c.head)); }
    static std::vector<scoring_layer> layers_of(const relevance_case & c) {
        return std::vector<scoring_layer>(c.n_layers, { 0, c.head, c.n_head, c.n_head_kv, ggml_backend_cpu_buffer_type() });
    }
    // Means, peaks, and what each head misses.
    std::vector<float> run(const relevance_data & d) {
        const scoring_shape shape = { d.c.n_rows, d.c.n_queries, d.c.prompt_end, d.c.n_sequences > 1 };
        scoring_graphs graphs(kept, { shape }, false);
        graphs.attach({ backend.get() });
        graphs.prepare(shape);
        const size_t n_scores = 2*size_t(d.c.n_rows);
        std::vector<float> out(n_scores + (d.c.magnitude ? 0 : kept.n_heads()), -7);
        CHECK(graphs.run({ d.scoring, d.mask, d.frozen }, out.data(), out.data() + n_scores));
        ggml_backend_synchronize(backend.get());
        return out;
    }

    ggml_backend_ptr backend;
    relevance        kept;
};

} // namespace

TEST(cases, "every case gives what plain loops give, whatever the order in which threads and blocks run, to the same bits") {
    for (const relevance_case & c : relevance_cases()) {
        const relevance_data   d(c);
        const relevance_result expected = expected_of(d);
        std::vector<on_card>   found;
        for (const shim::order order : ORDERS) {
            std::vector<uint64_t> scratch;
            shim::thread_order = order;
            found.push_back(run(d, scratch));
        }
        const double worst = std::max({ difference(expected.mean, found[0].mean), difference(expected.peak, found[0].peak), c.magnitude ? 0 : difference(expected.missed, found[0].missed) });
        if (!(worst < 2e-5)) {
            std::printf("%s: relative difference %g (mean %g, peak %g)\n", c.what, worst, difference(expected.mean, found[0].mean), difference(expected.peak, found[0].peak));
        }
        CHECK(worst < 2e-5);
        CHECK(found[0] == found[1] && found[0] == found[2]);
    }
}

TEST(portable, "the portable graph gives what plain loops give for the same cases, as far as it rounds queries to the index's type") {
    for (const relevance_case & c : relevance_cases()) {
        if (c.blind || c.odd_key != 0 || (c.magnitude && c.n_sequences == 1)) {
            continue; // no query may see nothing; which NaN wins is each backend's choice; such magnitudes are not masked
        }
        const relevance_data d(c);
        const relevance_result expected = expected_of(d);
        const std::vector<float> found = on_cpu(d).run(d);
        const auto half = found.begin() + std::ptrdiff_t(c.n_rows), end = half + std::ptrdiff_t(c.n_rows);
        std::vector<float> missed; // of each layer mean and worst, as the kernels have it
        for (auto head = end; head != found.end(); head += std::ptrdiff_t(c.n_head)) {
            missed.push_back(std::accumulate(head, head + std::ptrdiff_t(c.n_head), 0.0f) / float(c.n_head));
            missed.push_back(*std::max_element(head, head + std::ptrdiff_t(c.n_head)));
        }
        const double worst = std::max({ difference(expected.mean, { found.begin(), half }), difference(expected.peak, { half, end }),
            c.magnitude ? 0 : difference(expected.missed, missed) });
        const double tolerance = c.type == GGML_TYPE_F16 ? 4e-3 : 3e-2;
        if (!(worst < tolerance)) {
            std::printf("%s: relative difference %g\n", c.what, worst);
        }
        CHECK(worst < tolerance);
    }
}

TEST(launches, "a layer takes two launches, one for magnitudes; scratch serves layer after layer as the last left it") {
    const relevance_data d(relevance_cases()[4]);
    std::vector<uint64_t> scratch;
    const uint64_t before = shim::n_launches;
    const on_card first = run(d, scratch);
    CHECK(shim::n_launches - before == 2);
    CHECK(run(d, scratch) == first && run(d, scratch) == first);
    relevance_case magnitudes = d.c;
    magnitudes.magnitude = true;
    const uint64_t between = shim::n_launches;
    run(relevance_data(magnitudes), scratch);
    CHECK(shim::n_launches - between == 1);
}

TEST(missed, "missed attention is 0 where nothing is frozen and 1 where all is, and the worst head's is no smaller than the mean") {
    relevance_data d(relevance_cases()[6]);
    std::vector<uint64_t> scratch;
    const on_card some = run(d, scratch);
    CHECK(some.missed[0] > 0 && some.missed[1] > some.missed[0] && some.missed[1] < 1);
    std::fill(d.frozen.begin(), d.frozen.end(), 0.0f);
    CHECK(run(d, scratch).missed == std::vector<float>({ 0, 0 }));
    std::fill(d.frozen.begin(), d.frozen.end(), 1.0f);
    const on_card all = run(d, scratch);
    CHECK(std::fabs(all.missed[0] - 1) < 1e-6f && std::fabs(all.missed[1] - 1) < 1e-6f);
    CHECK(all.mean == some.mean && all.peak == some.peak); // what is frozen is scored as all else
}

TEST(refused, "what no kernel is there for is refused with a reason, and nothing is launched; a launch that fails is told") {
    const relevance_data d(relevance_cases()[1]);
    std::vector<uint64_t> scratch;
    on_card out = { std::vector<float>(d.c.n_rows), std::vector<float>(d.c.n_rows), std::vector<float>(2) };
    const uint64_t before = shim::n_launches;
    const auto refuses = [&](auto change) {
        cuda::relevance_layer l = layer_of(d, 0, out, scratch);
        change(l);
        return cuda::add_relevance(l, nullptr) != nullptr;
    };
    CHECK(refuses([](cuda::relevance_layer & l) { l.head = 0; }));
    CHECK(refuses([](cuda::relevance_layer & l) { l.head = 288; }));
    CHECK(refuses([](cuda::relevance_layer & l) { l.head = 80; })); // Q4_0 has blocks of 32
    CHECK(refuses([](cuda::relevance_layer & l) { l.n_head_kv = 3; }));
    CHECK(refuses([](cuda::relevance_layer & l) { l.n_rows = 0; }));
    CHECK(refuses([](cuda::relevance_layer & l) { l.n_queries = 0; }));
    CHECK(refuses([](cuda::relevance_layer & l) { l.missed = nullptr; }));
    CHECK(refuses([](cuda::relevance_layer & l) { l.magnitude = true; }));
    CHECK(shim::n_launches == before);
    for (const int launch : { 1, 2 }) {
        shim::fail_in = launch;
        const cuda::failure why = cuda::add_relevance(layer_of(d, 0, out, scratch), nullptr);
        CHECK(why && std::string(why) == "unspecified launch failure");
        CHECK(shim::fail_in == 0);
    }
}

TEST(rows, "rows of any length go to the staging buffer and back byte for byte, in one launch, and touch nothing else") {
    std::mt19937 random(5);
    const auto fill = [&](std::vector<uint8_t> & bytes) { for (uint8_t & b : bytes) { b = uint8_t(random()); } };
    constexpr uint32_t N_CELLS = 37;
    const std::vector<size_t> lengths = { 1, 2, 3, 7, 16, 34, 36, 66, 72, 110, 128, 136, 204, 512, 1088, 2048 };
    std::vector<std::vector<uint8_t>> tensors;
    std::vector<cuda::row_part> parts;
    size_t token_bytes = 0;
    for (const size_t n : lengths) {
        const size_t stride = n + (n % 3 == 0 ? 5 : 0);
        tensors.emplace_back(N_CELLS*stride + 1);
        fill(tensors.back());
        parts.push_back({ tensors.back().data() + n % 2, stride, uint32_t(n), token_bytes });
        token_bytes += n;
    }
    for (const std::vector<uint32_t> & cells : { std::vector<uint32_t>{ 11 }, { 36, 0, 5, 4, 29 }, {} }) {
        for (const shim::order order : ORDERS) {
            shim::thread_order = order;
            const auto before = tensors;
            std::vector<uint8_t> staging(cells.size()*token_bytes + 64, 0xaa);
            const uint64_t n_before = shim::n_launches;
            CHECK(cuda::move_rows(parts.data(), uint32_t(parts.size()), cells.data(), uint32_t(cells.size()), staging.data(), token_bytes, true, nullptr) == nullptr);
            CHECK(shim::n_launches - n_before == !cells.empty());
            CHECK(tensors == before);
            CHECK(std::all_of(staging.end() - 64, staging.end(), [](uint8_t b) { return b == 0xaa; }));
            for (size_t i = 0; i < cells.size(); ++i) {
                for (const cuda::row_part & p : parts) {
                    CHECK(std::memcmp(staging.data() + i*token_bytes + p.offset, p.base + cells[i]*p.stride, p.row_bytes) == 0);
                }
            }
            for (size_t i = 0; i < cells.size(); ++i) { // other bytes come back
                for (const cuda::row_part & p : parts) {
                    std::memset(p.base + cells[i]*p.stride, 0, p.row_bytes);
                }
            }
            CHECK(cuda::move_rows(parts.data(), uint32_t(parts.size()), cells.data(), uint32_t(cells.size()), staging.data(), token_bytes, false, nullptr) == nullptr);
            CHECK(tensors == before);
        }
    }
}

TEST(entropy, "an output row has the three numbers that the policy's own function gives, for odd logits, too") {
    std::mt19937 random(9);
    std::normal_distribution<float> normal(0, 4);
    for (const uint32_t n : { 1u, 31u, 1000u, 1025u, 49152u }) {
        const size_t stride = n + 3;
        constexpr uint32_t N_ROWS = 8;
        std::vector<float> logits(N_ROWS*stride, NAN); // what lies between rows is read by nobody
        for (uint32_t row = 0; row < N_ROWS; ++row) {
            float * x = logits.data() + row*stride;
            for (uint32_t i = 0; i < n; ++i) {
                x[i] = row == 1 ? 0 : row == 2 && i % 2 ? -INFINITY : row == 6 ? 1e30f : normal(random);
            }
            x[n/2] = row == 3 ? NAN : row == 4 ? INFINITY : x[n/2];
            if (row == 5) { std::fill(x, x + n, -INFINITY); }
            if (row == 7) { x[0] = INFINITY; x[n - 1] = NAN; }
        }
        for (const shim::order order : ORDERS) {
            shim::thread_order = order;
            std::vector<double> found(3*N_ROWS, -7);
            CHECK(cuda::output_entropy(logits.data(), stride, n, N_ROWS, found.data(), nullptr) == nullptr);
            for (uint32_t row = 0; row < N_ROWS; ++row) {
                const asrkf_output expected = entropy_of(logits.data() + row*stride, n);
                const double wanted[3] = { expected.log_sum_exp, expected.entropy, expected.top_probability };
                for (int i = 0; i < 3; ++i) {
                    const double x = found[row*3 + size_t(i)];
                    CHECK(std::isnan(wanted[i]) ? std::isnan(x) : x == wanted[i] || std::fabs(x - wanted[i]) <= 2e-6*std::max(1.0, std::fabs(wanted[i])));
                }
            }
        }
    }
    CHECK(cuda::output_entropy(nullptr, 0, 0, 1, nullptr, nullptr) != nullptr);
    CHECK(cuda::output_entropy(nullptr, 4, 4, 0, nullptr, nullptr) == nullptr);
}

int main() { return run_all_tests(); }
