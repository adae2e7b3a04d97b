// Every implementation of device_scorer, driven alike: the portable graph, and our CUDA kernels with all of their host code, which a
// shim of CUDA's runtime runs on a CPU. The device does nothing until somebody waits for it, and so does the kernels' stream: what has to be
// ordered and is not gives other numbers.
#include "check.h"
#include "cuda_cases.h"
#include "delaying.h"

#include "cuda/kernels.h"
#include "cuda/outputs.h"
#include "cuda/scorer.h"
#include "llama/outputs.h"
#include "policy/entropy.h"
#include "scoring/device_scorers.h"
#include "scoring/scoring_graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <utility>

using namespace asrkf;

namespace {

struct implementation {
    const char * name;
    bool         is_exact; // the portable graph rounds queries to what the index is multiplied with
    std::unique_ptr<device_scorer> (*make)(const device_part & part);
};
const implementation GRAPH = { "graph", false, [](const device_part & part) -> std::unique_ptr<device_scorer> { return std::make_unique<scoring_graphs>(part); } };
const implementation CUDA  = { "cuda", true, cuda::make_scorer };

// Streams of the shim that are made while this lives do nothing until somebody waits for them.
struct delays {
    delays() { shim::delays = true; }
    ~delays() { shim::delays = false; }
};

bool wants_cuda = false; // of the devices of this file
const bool added = add_scorer_kind({ [](ggml_backend_dev_t dev) { return wants_cuda && std::strcmp(ggml_backend_dev_name(dev), "delaying") == 0; }, cuda::make_scorer });

std::vector<scoring_layer> layers_of(const relevance_case & c, ggml_backend_buffer_type_t buft) {
    return std::vector<scoring_layer>(c.n_layers, { { 0, c.head, c.n_head, c.n_head_kv, buft } });
}

uint32_t n_ring_rows(const relevance_data & d) { return uint32_t(d.ring[0].size() / (size_t(d.c.n_head)*d.c.head)); }

// A layer's index without what lies between heads.
std::vector<uint8_t> rows_of(const relevance_data & d, uint32_t layer) {
    std::vector<uint8_t> rows;
    for (uint32_t kv = 0; kv < d.c.n_head_kv; ++kv) {
        const auto begin = d.index[layer].begin() + std::ptrdiff_t(kv*d.head_bytes());
        rows.insert(rows.end(), begin, begin + std::ptrdiff_t(d.c.n_rows*d.row_bytes));
    }
    return rows;
}

// Index and rings as a case has them; and the scale, which becomes known as a graph is built.
void fill(relevance & kept, const relevance_data & d) {
    ggml_init_params params = { 1024*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx(ggml_init(params));
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    const relevance::branch unused = kept.new_branch(ctx.get(), { 1, 1, 1 });
    for (uint32_t i = 0; i < d.c.n_layers; ++i) {
        kept.build(ctx.get(), graph, unused, i, ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d.c.head, d.c.n_head, 1),
                ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d.c.head, d.c.n_head_kv, 1), d.scale());
        kept.set_rows(i, 0, d.c.n_rows, rows_of(d, i).data());
        ggml_backend_tensor_set(kept.states()[i].ring, d.ring[i].data(), 0, d.ring[i].size()*sizeof(float));
    }
}

// A case on a device; once it stands, the backend's work writes index and rings.
struct kept_case {
    kept_case(const relevance_data & d, ggml_backend_buffer_type_t buft)
        : d(d), kept(layers_of(d.c, buft), d.c.n_rows, 1, n_ring_rows(d), d.c.type, d.c.magnitude ? SCORE_MAGNITUDE : SCORE_ATTENTION, d.c.soft_cap, false),
          shape({ d.c.n_rows, d.c.n_queries, d.c.prompt_end, d.c.n_sequences > 1 }) {
        fill(kept, d);
    }
    device_part part(bool no_alloc = false) const { return parts_of(kept, { shape }, no_alloc)[0]; }
    scoring_inputs inputs() const { return { d.scoring, kept.has_mask(shape) ? d.mask : std::vector<float>(), d.c.magnitude ? std::vector<float>() : d.frozen }; }
    // The backend's work: other keys and queries in place of those that are there. `with` must stay.
    void write(delaying_device & device, const relevance_data & with) const {
        for (uint32_t i = 0; i < d.c.n_layers; ++i) {
            ggml_backend_tensor_set_async(&device.backend, kept.states()[i].ring, with.ring[i].data(), 0, with.ring[i].size()*sizeof(float));
            for (uint32_t kv = 0; kv < d.c.n_head_kv; ++kv) {
                const ggml_tensor * index = kept.states()[i].index;
                ggml_backend_tensor_set_async(&device.backend, kept.states()[i].index, with.index[i].data() + kv*with.head_bytes(), kv*index->nb[2], d.c.n_rows*d.row_bytes);
            }
        }
    }

    const relevance_data & d;
    relevance              kept;
    const scoring_shape    shape;
};

struct outputs {
    explicit outputs(const kept_case & k) : scores(2*size_t(k.d.c.n_rows), -7), missed(k.d.c.magnitude ? 0 : k.kept.n_heads(), -7) {}
    bool are_untouched() const {
        const auto is = [](float x) { return x == -7; };
        return std::all_of(scores.begin(), scores.end(), is) && std::all_of(missed.begin(), missed.end(), is);
    }
    double difference_to(const relevance_result & expected) const {
        const auto half = scores.begin() + std::ptrdiff_t(scores.size() / 2);
        return std::max({ difference(expected.mean, { scores.begin(), half }), difference(expected.peak, { half, scores.end() }),
            missed.empty() ? 0 : difference(expected.missed, missed) });
    }
    std::vector<float> scores, missed;
};

double tolerance(const implementation & how, ggml_type type) { return how.is_exact ? 2e-5 : type == GGML_TYPE_F16 ? 4e-3 : 3e-2; }

// The first case with other numbers in it.
relevance_data other_data(const relevance_data & d) {
    relevance_data other(d.c);
    for (auto & ring : other.ring) {
        std::reverse(ring.begin(), ring.end());
    }
    for (auto & index : other.index) { // rows trade places
        for (uint32_t kv = 0; kv < d.c.n_head_kv; ++kv) {
            for (uint32_t r = 0; r < d.c.n_rows / 2; ++r) {
                std::swap_ranges(index.data() + kv*d.head_bytes() + r*d.row_bytes, index.data() + kv*d.head_bytes() + (r + 1)*d.row_bytes,
                        index.data() + kv*d.head_bytes() + (d.c.n_rows - 1 - r)*d.row_bytes);
            }
        }
    }
    for (size_t layer = 0; layer < other.keys.size(); ++layer) {
        for (size_t row = 0; row < size_t(d.c.n_head_kv)*d.c.n_rows; ++row) {
            const size_t kv = row / d.c.n_rows, r = row % d.c.n_rows;
            ggml_get_type_traits(d.c.type)->to_float(other.index[layer].data() + kv*d.head_bytes() + r*d.row_bytes, other.keys[layer].data() + row*d.c.head, d.c.head);
        }
    }
    return other;
}

} // namespace

TEST(cases, "every case gives what plain loops give, by the graph and by the kernels, with the device's events and without, and not before somebody waits") {
    for (const relevance_case & c : relevance_cases()) {
        const relevance_data   d(c);
        const relevance_result expected = expected_of(d);
        for (const implementation & how : { GRAPH, CUDA }) {
            if (!how.is_exact && (c.blind || c.odd_key != 0)) {
                continue; // no query may see nothing; which NaN wins is each backend's choice
            }
            for (const bool has_events : { true, false }) {
                const delays    all;
                delaying_device device;
                device.has_events = has_events;
                const kept_case k(d, &device.memory);
                const auto scorer = how.make(k.part());
                CHECK(std::strcmp(scorer->kind(), how.name) == 0 && scorer->note().empty());
                scorer->attach(&device.backend);
                scorer->prepare(k.shape);
                outputs out(k);
                const scoring_inputs in = k.inputs();
                scorer->run(in, out.scores.data(), out.missed.data());
                CHECK(out.are_untouched());
                scorer->wait();
                relevance_result wanted = expected;
                if (c.magnitude && !k.kept.has_mask(k.shape)) { // of one sequence: nothing is hidden
                    relevance_data seen = d;
                    std::fill(seen.mask.begin(), seen.mask.end(), 1.0f);
                    wanted = expected_of(seen);
                }
                const double worst = out.difference_to(wanted);
                if (!(worst < tolerance(how, c.type))) {
                    std::printf("%s, %s: relative difference %g\n", c.what, how.name, worst);
                }
                CHECK(worst < tolerance(how, c.type));
            }
        }
    }
}

TEST(behind, "a run sees what the backend was given before it and has not done yet") {
    const relevance_data d(relevance_cases()[13]); // two layers, Q8_0
    const relevance_data other = other_data(d);
    const relevance_result before = expected_of(d), after = expected_of(other);
    for (const implementation & how : { GRAPH, CUDA }) {
        for (const bool has_events : { true, false }) {
            const delays    all;
            delaying_device device;
            device.has_events = has_events;
            const kept_case k(d, &device.memory);
            k.write(device, other);
            CHECK(device.queue.n_waiting() > 0);
            const auto scorer = how.make(k.part());
            scorer->attach(&device.backend);
            scorer->prepare(k.shape);
            const scoring_inputs in = k.inputs();
            outputs out(k);
            scorer->run(in, out.scores.data(), out.missed.data());
            scorer->wait();
            CHECK(out.difference_to(after) < tolerance(how, d.c.type) && out.difference_to(before) > 10*tolerance(how, d.c.type));
        }
    }
}

TEST(order, "a run sees nothing of what the backend is given after before_writes()") {
    const relevance_data d(relevance_cases()[13]);
    const relevance_data other = other_data(d);
    const relevance_result before = expected_of(d), after = expected_of(other);
    for (const implementation & how : { GRAPH, CUDA }) {
        for (const bool has_events : { true, false }) {
            for (const bool told : { true, false }) {
                const delays    all;
                delaying_device device;
                device.has_events = has_events;
                const kept_case k(d, &device.memory);
                k.write(device, other);
                const auto scorer = how.make(k.part());
                scorer->attach(&device.backend);
                scorer->prepare(k.shape);
                const scoring_inputs in = k.inputs();
                outputs first(k), second(k);
                scorer->run(in, first.scores.data(), first.missed.data());
                if (told) {
                    scorer->before_writes();
                }
                k.write(device, d);
                ggml_backend_synchronize(&device.backend);
                scorer->wait();
                const bool is_ordered = first.difference_to(after) < tolerance(how, d.c.type);
                CHECK(is_ordered == (told || !how.is_exact)); // the backend orders what it is given; the kernels have to tell it
                scorer->before_writes(); // once more does no harm
                scorer->run(in, second.scores.data(), second.missed.data());
                scorer->wait();
                CHECK(second.difference_to(before) < tolerance(how, d.c.type));
            }
        }
    }
}

TEST(again, "runs follow each other without a wait, with inputs of their own; shapes of all sizes serve in turn") {
    const relevance_data d(relevance_cases()[4]);
    const delays    all;
    delaying_device device;
    const kept_case k(d, &device.memory);
    const auto scorer = cuda::make_scorer(k.part());
    scorer->attach(&device.backend);
    scorer->prepare(k.shape);
    std::vector<outputs> found(3, outputs(k));
    for (uint32_t i = 0; i < 3; ++i) {
        scoring_inputs in = k.inputs();
        std::fill(in.frozen.begin(), in.frozen.end(), float(i)/2);
        scorer->run(in, found[i].scores.data(), found[i].missed.data()); // and the inputs go
    }
    scorer->wait();
    const relevance_result expected = expected_of(d);
    for (uint32_t i = 0; i < 3; ++i) {
        CHECK(difference(expected.mean, { found[i].scores.begin(), found[i].scores.begin() + d.c.n_rows }) < 2e-5);
        CHECK(std::all_of(found[i].missed.begin(), found[i].missed.end(), [&](float x) { return std::fabs(x - float(i)/2) < 1e-5f; }));
    }
    for (const uint32_t n_rows : { 1u, 512u, 700u, d.c.n_rows }) { // the first rows alone
        scorer->prepare({ n_rows, d.c.n_queries, false, false });
        scoring_inputs in = { d.scoring, {}, std::vector<float>(n_rows, 1) };
        for (uint32_t q = 0; q < d.c.n_queries; ++q) {
            in.mask.insert(in.mask.end(), d.mask.begin() + q*d.c.n_rows, d.mask.begin() + q*d.c.n_rows + n_rows);
        }
        std::vector<float> scores(2*n_rows), missed(d.c.n_head);
        scorer->run(in, scores.data(), missed.data());
        scorer->wait();
        double sum = 0;
        for (uint32_t r = 0; r < n_rows; ++r) { sum += double(scores[r]); }
        CHECK(std::fabs(sum - 1) < 1e-5 && std::fabs(missed[0] - 1) < 1e-5f);
    }
    CHECK(!thrown([&] { scorer->prepare({ d.c.n_rows + 1, d.c.n_queries, false, false }); }).empty());
    CHECK(!thrown([&] { scorer->prepare({ d.c.n_rows, d.c.n_queries + 1, false, false }); }).empty());
}

TEST(end, "a scorer that ends waits for what it has under way, and leaves no stream and no event") {
    const relevance_data d(relevance_cases()[6]);
    const int64_t n_before = shim::n_alive;
    for (const bool has_events : { true, false }) {
        const delays    all;
        delaying_device device;
        device.has_events = has_events;
        const kept_case k(d, &device.memory);
        auto scorer = cuda::make_scorer(k.part());
        CHECK(shim::n_alive > n_before);
        scorer->attach(&device.backend);
        scorer->prepare(k.shape);
        auto out = std::make_unique<outputs>(k);
        scorer->run(k.inputs(), out->scores.data(), out->missed.data());
        scorer.reset();
        CHECK(shim::n_left == 0 && out->difference_to(expected_of(d)) < 2e-5);
        out.reset();
        ggml_backend_synchronize(&device.backend);
        CHECK(shim::n_alive == n_before);
    }
}

TEST(faults, "any call of CUDA's may fail: the run says so, leaves the current device as it was, and the next one is right") {
    const relevance_data   d(relevance_cases()[1]);
    const relevance_result expected = expected_of(d);
    for (const bool has_events : { true, false }) {
        const delays    all;
        delaying_device device;
        device.has_events = has_events;
        const kept_case k(d, &device.memory);
        const auto scorer = cuda::make_scorer(k.part());
        scorer->attach(&device.backend);
        scorer->prepare(k.shape);
        const scoring_inputs in = k.inputs();
        shim::device = 3; // somebody else's
        int n_faults = 0;
        for (bool all_went_well = false; !all_went_well; ++n_faults) {
            outputs out(k);
            shim::fail_in = n_faults + 1;
            const std::string text = thrown([&] {
                scorer->run(in, out.scores.data(), out.missed.data());
                scorer->before_writes();
                scorer->wait();
            });
            all_went_well = shim::fail_in > 0;
            shim::fail_in = 0;
            CHECK(shim::device == 3 || text.empty());
            shim::device = 3; // a call that gives the device back may be the one that fails
            CHECK(text.empty() || text.find("CUDA failed to ") == 0);
            CHECK(!all_went_well || text.empty());
            outputs next(k);
            scorer->run(in, next.scores.data(), next.missed.data());
            scorer->wait();
            CHECK(next.difference_to(expected) < 2e-5);
        }
        CHECK(n_faults > 12);
    }
    shim::device = 0;
}

TEST(chosen, "a device has the kernels where they can do its part, and the portable graph elsewhere, which is said once") {
    delaying_device device;
    const scoring_shape shape = { 0, 4, false, false };
    const auto made = [&](int64_t head, int64_t n_head, ggml_type type, bool with_cpu = false, bool no_alloc = false) {
        std::vector<scoring_layer> layers = { { { 5, head, n_head, 2, &device.memory } } };
        if (with_cpu) {
            layers.push_back({ { 7, head, n_head, 2, ggml_backend_cpu_buffer_type() } });
        }
        const relevance kept(layers, 512, 1, 8, type, SCORE_ATTENTION, 0, no_alloc);
        device_scorers scorers(kept, { shape }, no_alloc);
        std::string text = scorers.kinds();
        for (const std::string & note : scorers.notes()) {
            text += "; " + note;
        }
        return text;
    };
    CHECK(made(64, 4, GGML_TYPE_Q4_0) == "graph");
    wants_cuda = true;
    CHECK(made(64, 4, GGML_TYPE_Q4_0) == "cuda" && made(80, 4, GGML_TYPE_F16) == "cuda" && made(64, 4, GGML_TYPE_Q8_0, false, true) == "cuda");
    CHECK(made(64, 4, GGML_TYPE_Q4_0, true) == "cuda+graph");
    const std::string prefix = "graph; scores on delaying are computed by the portable graph: ";
    CHECK(made(64, 4, GGML_TYPE_Q5_0) == prefix + "no kernel for an index of q5_0");
    CHECK(made(288, 4, GGML_TYPE_F16).find(prefix + "no kernel for heads of more than 256 elements") == 0);
    CHECK(made(288, 4, GGML_TYPE_F16).find("as layer 5 has") != std::string::npos);
    for (int i = 1; ; ++i) { // a card that refuses: no kernel, no stream
        shim::fail_in = i;
        const std::string text = made(64, 4, GGML_TYPE_Q4_0);
        if (std::exchange(shim::fail_in, 0) > 0) {
            CHECK(text == "cuda" && i > 5);
            break;
        }
        CHECK(text.find(prefix + "CUDA failed to ") == 0 || text == "cuda"); // giving the current device back may fail
    }
    device.can_pin = false;
    CHECK(made(64, 4, GGML_TYPE_Q4_0) == "cuda; memory for what scores on delaying need could not be pinned: its upload is slower from pageable memory");
    wants_cuda = false;
}

TEST(bytes, "what a scorer will have on the device is known without having it, and the kernels have a fraction of the graph's") {
    delaying_device device;
    const std::vector<scoring_layer> layers = { { { 3, 128, 32, 8, &device.memory } }, { { 7, 128, 32, 8, &device.memory } } };
    const std::vector<scoring_shape> largest = { { 0, 8, false, false }, { 0, 32, true, false } };
    size_t n_bytes[2];
    for (const bool cuda : { false, true }) {
        wants_cuda = cuda;
        const relevance there(layers, 8192, 1, 40, GGML_TYPE_Q4_0, SCORE_ATTENTION, 0, false), planned(layers, 8192, 1, 40, GGML_TYPE_Q4_0, SCORE_ATTENTION, 0, true);
        n_bytes[cuda] = device_scorers(there, largest, false).device_bytes();
        CHECK(device_scorers(planned, largest, true).device_bytes() == n_bytes[cuda]);
    }
    wants_cuda = false;
    CHECK(n_bytes[1] >= 8192*(32 + 3)*sizeof(float) && n_bytes[1] < n_bytes[0] / 8);
}

namespace {

struct reader_kind { const char * name; std::unique_ptr<output_reader> (*make)(ggml_backend_dev_t device, uint32_t n_slots); };
const reader_kind HOST_READER = { "host", [](ggml_backend_dev_t, uint32_t n_slots) { return make_host_reader(n_slots); } };
const reader_kind CUDA_READER = { "cuda", cuda::make_output_reader };

} // namespace

TEST(read_outputs, "an output row is read as the step left it, and the next step's logits come after that, with the device's events and without") {
    for (const reader_kind & kind : { HOST_READER, CUDA_READER }) {
        for (const bool has_events : { true, false }) {
            const delays delayed;
            delaying_device device;
            device.has_events = has_events;
            constexpr int64_t N = 3001, N_ROWS = 3, N_STEPS = 4;
            const ggml_init_params params = { 4*ggml_tensor_overhead(), nullptr, true };
            const ggml_context_ptr ctx(ggml_init(params));
            ggml_tensor * logits = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, N, N_ROWS);
            const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), &device.memory));
            std::mt19937 random(5);
            std::normal_distribution<float> normal(0, 3);
            std::vector<std::vector<float>> steps(N_STEPS, std::vector<float>(N*N_ROWS));
            const std::unique_ptr<output_reader> reader = kind.make(device.backend.device, N_STEPS);
            CHECK(reader->beats_host() == (std::string(kind.name) == "cuda"));
            for (uint32_t step = 0; step < N_STEPS; ++step) {
                std::generate(steps[step].begin(), steps[step].end(), [&] { return normal(random); });
                ggml_backend_tensor_set_async(&device.backend, logits, steps[step].data(), 0, ggml_nbytes(logits));
                reader->read(&device.backend, logits, step % N_ROWS, step);
            }
            for (const uint32_t step : { 2, 0, 3, 1 }) {
                const asrkf_output found = reader->of(step), expected = entropy_of(steps[step].data() + step % N_ROWS*N, N);
                CHECK(std::fabs(found.entropy - expected.entropy) < 1e-5 && std::fabs(found.log_sum_exp - expected.log_sum_exp) < 1e-5);
                CHECK(std::fabs(found.top_probability - expected.top_probability) < 1e-6 && found.struct_size == sizeof(asrkf_output));
            }
            steps[0][7] = NAN;
            ggml_backend_tensor_set_async(&device.backend, logits, steps[0].data(), 0, ggml_nbytes(logits));
            reader->read(&device.backend, logits, 0, 0);
            CHECK(std::isnan(reader->of(0).entropy));
        }
    }
    CHECK(shim::n_alive == 0 && shim::n_left == 0);
}

TEST(two_devices, "two devices' scores come side by side, by different scorers") {
    const relevance_data d(relevance_cases()[13]); // of two layers
    const relevance_case & c = d.c;
    const delays    all;
    delaying_device device;
    wants_cuda = true;
    const std::vector<scoring_layer> layers = { { { 0, c.head, c.n_head, c.n_head_kv, ggml_backend_cpu_buffer_type() } }, { { 1, c.head, c.n_head, c.n_head_kv, &device.memory } } };
    relevance kept(layers, c.n_rows, 1, n_ring_rows(d), c.type, SCORE_ATTENTION, c.soft_cap, false);
    fill(kept, d);
    const scoring_shape shape = { c.n_rows, c.n_queries, false, false };
    ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    device_scorers scorers(kept, { shape }, false);
    CHECK(scorers.kinds() == "cuda+graph" && scorers.size() == 2 && !scorers.is_attached());
    scorers.attach({ cpu.get(), &device.backend });
    scorers.prepare(shape);
    std::vector<float> scores(4*size_t(c.n_rows)), missed(kept.n_heads());
    const scoring_inputs in = { d.scoring, d.mask, d.frozen };
    scorers.run(in, scores.data(), missed.data());
    scorers.before_writes();
    scorers.wait();
    const relevance_result expected = expected_of(d);
    std::vector<float> mean, peak;
    for (uint32_t r = 0; r < c.n_rows; ++r) {
        mean.push_back(scores[r] + scores[2*c.n_rows + r]);
        peak.push_back(std::max(scores[c.n_rows + r], scores[3*c.n_rows + r]));
    }
    CHECK(difference(expected.mean, mean) < 3e-2 && difference(expected.peak, peak) < 3e-2 && difference(expected.missed, missed) < 3e-2);
    wants_cuda = false;
    CHECK(thrown([&] { scorers.attach({ cpu.get() }); }).find("no backend of this context") == 0);
}

int main() { return run_all_tests(); }
