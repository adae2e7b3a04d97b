// The kernels of native/cuda/, their own source run on a CPU (cuda_shim.h), against plain loops. No card is asked for, and none is spoken
// for. How the engine uses them: test_scorers.cpp, test_cuda_engine.cpp.
#include "check.h"
#include "cuda_cases.h"

#include "cuda/kernels.h"
#include "policy/entropy.h"

#include <algorithm>
#include <array>

using namespace asrkf;

namespace {

constexpr std::array<shim::order, 3> ORDERS = { shim::order::ascending, shim::order::descending, shim::order::uneven };

struct on_card {
    std::vector<float> mean, peak, missed; // missed: of each head, layer by layer
    bool operator==(const on_card & o) const {
        const auto same = [](const std::vector<float> & a, const std::vector<float> & b) { return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0); };
        return same(mean, o.mean) && same(peak, o.peak) && same(missed, o.missed);
    }
};

struct scratch_memory {
    std::vector<uint64_t> bytes;
    std::vector<uint32_t> finished;
};

cuda::relevance_layer layer_of(const relevance_data & d, uint32_t i, on_card & out, scratch_memory & scratch) {
    const relevance_case & c = d.c;
    const cuda::row_type type = c.type == GGML_TYPE_F16 ? cuda::row_type::f16 : c.type == GGML_TYPE_Q8_0 ? cuda::row_type::q8_0 : cuda::row_type::q4_0;
    scratch.bytes.resize(cuda::relevance_scratch_bytes(c.n_head, c.n_rows, c.n_queries)/sizeof(uint64_t) + 1, UINT64_MAX);
    scratch.finished.resize(c.n_head_kv, 0);
    const bool with_missed = !c.magnitude;
    return { type, d.index[i].data(), d.head_bytes(), d.ring[i].data(), d.scoring.data(), d.mask.data(), with_missed ? d.frozen.data() : nullptr, c.head, c.n_head, c.n_head_kv,
        c.n_rows, c.n_queries, c.n_layers, d.scale(), c.soft_cap, c.magnitude, c.prompt_end, i == 0, out.mean.data(), out.peak.data(), with_missed ? out.missed.data() + c.n_head*i : nullptr, scratch.bytes.data(), scratch.finished.data() };
}

on_card run(const relevance_data & d, scratch_memory & scratch) {
    on_card out = { std::vector<float>(d.c.n_rows, -7), std::vector<float>(d.c.n_rows, -7), std::vector<float>(d.c.magnitude ? 0 : d.c.n_head*d.c.n_layers, -7) };
    for (uint32_t i = 0; i < d.c.n_layers; ++i) {
        const cuda::failure why = cuda::add_relevance(layer_of(d, i, out, scratch), nullptr);
        CHECK(why == nullptr);
    }
    return out;
}

} // namespace

TEST(cases, "every case gives what plain loops give, whatever the order in which threads and blocks run, to the same bits") {
    for (const relevance_case & c : relevance_cases()) {
        const relevance_data   d(c);
        const relevance_result expected = expected_of(d);
        std::vector<on_card>   found;
        for (const shim::order order : ORDERS) {
            scratch_memory scratch;
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

TEST(launches, "a layer takes two launches, one for magnitudes; scratch serves layer after layer as the last left it") {
    const relevance_data d(relevance_cases()[4]);
    scratch_memory scratch;
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

TEST(missed, "a head misses nothing where nothing is frozen and all where all is") {
    relevance_data d(relevance_cases()[6]);
    scratch_memory scratch;
    const on_card some = run(d, scratch);
    CHECK(some.missed.size() == d.c.n_head && std::all_of(some.missed.begin(), some.missed.end(), [](float x) { return x > 0 && x < 1; }));
    std::fill(d.frozen.begin(), d.frozen.end(), 0.0f);
    CHECK(run(d, scratch).missed == std::vector<float>(d.c.n_head, 0));
    std::fill(d.frozen.begin(), d.frozen.end(), 1.0f);
    const on_card all = run(d, scratch);
    CHECK(std::all_of(all.missed.begin(), all.missed.end(), [](float x) { return std::fabs(x - 1) < 1e-6f; }));
    CHECK(all.mean == some.mean && all.peak == some.peak); // what is frozen is scored as all else
}

TEST(refused, "what no kernel is there for is refused with a reason, and nothing is launched; a launch that fails is told") {
    const relevance_data d(relevance_cases()[1]);
    scratch_memory scratch;
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

TEST(rows, "rows of any length, other cells of each tensor, cross and come back byte for byte, in one launch, and touch nothing else") {
    std::mt19937 random(5);
    const auto fill = [&](std::vector<uint8_t> & bytes) { for (uint8_t & b : bytes) { b = uint8_t(random()); } };
    constexpr uint32_t N_CELLS = 37;
    const std::vector<std::vector<uint32_t>> lists = { { 11 }, { 36, 0, 5, 4, 29 }, {}, { 1, 2, 3, 4, 5, 6, 7, 8, 30 } };
    const std::vector<uint32_t> lengths = { 1, 2, 3, 7, 16, 34, 36, 66, 72, 110, 128, 136, 204, 512, 1088, 2048 };
    std::vector<std::vector<uint8_t>> tensors;
    std::vector<row_slice> slices;
    size_t n_bytes = lengths.size()*sizeof(row_slice);
    std::vector<size_t> cells_at;
    for (const auto & cells : lists) {
        cells_at.push_back(n_bytes);
        n_bytes += cells.size()*sizeof(uint32_t);
    }
    uint32_t n_rows = 0;
    for (size_t i = 0; i < lengths.size(); ++i) {
        const uint32_t n = lengths[i];
        const size_t stride = n + (n % 3 == 0 ? 5 : 0), list = i % lists.size();
        tensors.emplace_back(N_CELLS*stride + 1);
        fill(tensors.back());
        n_bytes += n % 2; // some rows lie at odd places
        slices.push_back({ tensors.back().data() + n % 2, stride, cells_at[list], n_bytes, n, uint32_t(lists[list].size()) });
        n_bytes += n*lists[list].size();
        n_rows = std::max(n_rows, slices.back().n_rows);
    }
    for (const shim::order order : ORDERS) {
        shim::thread_order = order;
        const auto before = tensors;
        std::vector<uint8_t> crossing(n_bytes + 64, 0xaa);
        std::memcpy(crossing.data(), slices.data(), slices.size()*sizeof(row_slice));
        for (size_t i = 0; i < lists.size(); ++i) {
            std::copy_n(reinterpret_cast<const uint8_t *>(lists[i].data()), lists[i].size()*sizeof(uint32_t), crossing.begin() + std::ptrdiff_t(cells_at[i]));
        }
        const uint64_t n_before = shim::n_launches;
        CHECK(cuda::move_rows(crossing.data(), uint32_t(slices.size()), n_rows, true, nullptr) == nullptr);
        CHECK(shim::n_launches - n_before == 1 && tensors == before);
        CHECK(std::all_of(crossing.end() - 64, crossing.end(), [](uint8_t b) { return b == 0xaa; }));
        for (size_t i = 0; i < slices.size(); ++i) {
            const row_slice & s = slices[i];
            for (uint32_t row = 0; row < s.n_rows; ++row) { // other bytes come back
                uint8_t * cell = s.base + lists[i % lists.size()][row]*s.stride;
                CHECK(std::memcmp(crossing.data() + s.rows_at + row*s.row_bytes, cell, s.row_bytes) == 0);
                std::memset(cell, 0, s.row_bytes);
            }
        }
        CHECK(tensors != before);
        CHECK(cuda::move_rows(crossing.data(), uint32_t(slices.size()), n_rows, false, nullptr) == nullptr);
        CHECK(tensors == before);
    }
    const uint64_t n_before = shim::n_launches;
    CHECK(cuda::move_rows(nullptr, 0, 0, true, nullptr) == nullptr && cuda::move_rows(nullptr, 3, 0, true, nullptr) == nullptr);
    CHECK(cuda::move_rows(nullptr, 70000, 1, true, nullptr) != nullptr && shim::n_launches == n_before);
    CHECK(cuda::lacks_row_kernel() == nullptr);
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
