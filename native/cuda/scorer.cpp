#include "cuda/scorer.h"

#include "cuda/kernels.h"
#include "cuda/runtime.h"

#include <algorithm>
#include <cstring>

namespace asrkf::cuda {

namespace {

constexpr size_t ALIGNMENT = 256;

// Where things lie in the device's memory.
struct room {
    explicit room(const device_part & part);

    size_t results, inputs, scratch, finished, n_bytes;
    size_t inputs_bytes;
};

room::room(const device_part & part) {
    const size_t n_rows = part.kept->rows();
    size_t n_inputs = 0, scratch_bytes = 0, n_finished = 0;
    for (const scoring_shape & shape : part.largest) {
        n_inputs = std::max(n_inputs, shape.n_scoring*(1 + n_rows) + n_rows*part.kept->n_sets());
        for (const size_t i : part.layers) {
            const scoring_layer & l = part.kept->layers()[i];
            scratch_bytes = std::max(scratch_bytes, relevance_scratch_bytes(uint32_t(l.n_head), uint32_t(n_rows), shape.n_scoring));
            n_finished    = std::max(n_finished, size_t(l.n_head_kv));
        }
    }
    inputs_bytes = n_inputs*sizeof(float);
    n_bytes = 0;
    const auto place = [this](size_t size) {
        const size_t at = n_bytes;
        n_bytes += (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        return at;
    };
    results  = place((2*n_rows + part.n_heads())*sizeof(float));
    inputs   = place(inputs_bytes);
    scratch  = place(scratch_bytes);
    finished = place(n_finished*sizeof(uint32_t));
}

class scorer final : public device_scorer {
public:
    explicit scorer(const device_part & part);
    ~scorer() override;

    const char * kind() const override { return "cuda"; }
    size_t device_bytes() const override { return places.n_bytes; }
    std::string note() const override;
    void attach(ggml_backend_t b) override { backend = b; }
    void prepare(const scoring_shape & shape) override;
    void run(const scoring_inputs & in, float * out, float * out_missed) override;
    void before_writes() override;
    void wait() override;

private:
    void find_kernels();
    void make_queue();
    void allocate();
    void upload(const scoring_inputs & in);
    relevance_layer layer_of(size_t i) const;
    template <typename T> T * on_device(size_t offset) const {
        return reinterpret_cast<T *>(static_cast<uint8_t *>(ggml_backend_buffer_get_base(memory.get())) + offset);
    }

    const device_part       part;
    const room              places;
    row_type                type   = row_type::f16;
    int                     number = 0; // of the device, as CUDA counts
    ggml_backend_t          backend = nullptr;
    ggml_backend_buffer_ptr memory, staging; // the device's; the host's, pinned if that can be had
    owned<cudaStream_t>     stream;
    owned<cudaEvent_t>      uploaded;        // the staging memory is free again
    ggml_backend_event_ptr  written, scored; // by the backend, and of what it wrote; null where the device makes none
    scoring_shape           shape;           // as prepared last
    bool                    is_running = false; // and nobody waits for it yet
    bool                    is_marked  = false; // by `scored`
};

scorer::scorer(const device_part & part) : part(part), places(part) {
    find_kernels();
    if (part.no_alloc) {
        return;
    }
    try {
        make_queue();
    } catch (const error & e) {
        throw error(ASRKF_UNSUPPORTED, e.what());
    }
    allocate();
}

void scorer::find_kernels() {
    const auto & states = part.kept->states();
    switch (const ggml_type of_index = states[part.layers[0]].index->type) {
        case GGML_TYPE_F16:  type = row_type::f16; break;
        case GGML_TYPE_Q8_0: type = row_type::q8_0; break;
        case GGML_TYPE_Q4_0: type = row_type::q4_0; break;
        default: throw error(ASRKF_UNSUPPORTED, format("no kernel for an index of %s", ggml_type_name(of_index)));
    }
    for (const size_t i : part.layers) {
        const scoring_layer & l = part.kept->layers()[i];
        if (const failure why = refuses_heads(type, uint32_t(l.head), uint32_t(l.n_head), uint32_t(l.n_head_kv))) {
            throw error(ASRKF_UNSUPPORTED, format("no kernel for %s, as layer %u has", why, l.il));
        }
    }
}

void scorer::make_queue() {
    number = number_of(part.kept->states()[part.layers[0]].index->data);
    const current_device chosen(number);
    check(lacks_kernel(type), "find a kernel for it");
    stream = new_stream();
    cudaEvent_t new_event = nullptr;
    check(cudaEventCreateWithFlags(&new_event, cudaEventDisableTiming), "make an event");
    uploaded.reset(new_event);
    written.reset(ggml_backend_event_new(part.device));
    scored.reset(ggml_backend_event_new(part.device));
}

void scorer::allocate() {
    memory.reset(ggml_backend_buft_alloc_buffer(part.buft, places.n_bytes));
    if (!memory) {
        throw error(ASRKF_INTERNAL, format("no %zu bytes on %s to compute scores in: lower n_ctx, or name fewer score_layers", places.n_bytes,
                ggml_backend_buft_name(part.buft)));
    }
    ggml_backend_buffer_clear(memory.get(), 0); // the counters of finished blocks
    ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(part.device);
    staging.reset(ggml_backend_buft_alloc_buffer(pinned ? pinned : ggml_backend_cpu_buffer_type(), places.inputs_bytes));
    if (!staging) {
        throw error(ASRKF_INTERNAL, format("no %zu bytes of host memory for what scores need", places.inputs_bytes));
    }
}

scorer::~scorer() { finish(number, stream.get()); }

std::string scorer::note() const {
    ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(part.device);
    const bool is_pinned = pinned && (!staging || ggml_backend_buffer_get_type(staging.get()) == pinned);
    return is_pinned ? "" : format("memory for what scores on %s need could not be pinned: its upload is slower from pageable memory", ggml_backend_dev_name(part.device));
}

void scorer::prepare(const scoring_shape & next) {
    const auto fits = [&](const scoring_shape & s) { return next.n_scoring <= s.n_scoring; };
    if (next.n_scored > part.kept->rows() || std::none_of(part.largest.begin(), part.largest.end(), fits)) {
        throw error(ASRKF_INTERNAL, format("scoring %u rows by %u queries does not fit the room that was reserved on %s", next.n_scored, next.n_scoring,
                ggml_backend_buft_name(part.buft)));
    }
    shape = next;
}

void scorer::run(const scoring_inputs & in, float * out, float * out_missed) {
    const current_device chosen(number);
    upload(in); // needs nothing of the step
    wait_for(backend, written, stream.get());
    for (size_t i = 0; i < part.layers.size(); ++i) {
        check(add_relevance(layer_of(i), stream.get()), "score");
    }
    const float * results = on_device<float>(places.results);
    const size_t  n = 2*size_t(shape.n_scored);
    check(cudaMemcpyAsync(out, results, n*sizeof(float), cudaMemcpyDeviceToHost, stream.get()), "fetch scores");
    if (part.kept->kind == SCORE_ATTENTION) {
        check(cudaMemcpyAsync(out_missed, results + n, part.n_heads()*sizeof(float), cudaMemcpyDeviceToHost, stream.get()), "fetch missed attention");
    }
    is_running = true;
    is_marked  = scored && succeeded(cudaEventRecord(inside(scored), stream.get()));
}

// One after the other: the rows of the queries, the mask, what is frozen. layer_of() finds them there.
void scorer::upload(const scoring_inputs & in) {
    check(cudaEventSynchronize(uploaded.get()), "wait for its uploads");
    auto * const begin = static_cast<uint8_t *>(ggml_backend_buffer_get_base(staging.get()));
    uint8_t * end = begin;
    const auto append = [&](const auto & values) {
        if (!values.empty()) {
            std::memcpy(end, values.data(), values.size()*sizeof(values[0]));
            end += values.size()*sizeof(values[0]);
        }
    };
    append(in.scoring);
    append(in.mask);
    append(in.frozen);
    check(cudaMemcpyAsync(on_device<uint8_t>(places.inputs), begin, size_t(end - begin), cudaMemcpyHostToDevice, stream.get()), "upload what scores need");
    check(cudaEventRecord(uploaded.get(), stream.get()), "mark an upload");
}

relevance_layer scorer::layer_of(size_t i) const {
    const relevance & kept = *part.kept;
    const scoring_layer & spec = kept.layers()[part.layers[i]];
    const relevance::state & state = kept.states()[part.layers[i]];
    const size_t n = shape.n_scored;
    const bool   attends = kept.kind == SCORE_ATTENTION;
    const auto * queries = on_device<const int32_t>(places.inputs);
    const auto * mask    = reinterpret_cast<const float *>(queries + shape.n_scoring);
    const auto * frozen  = mask + (kept.has_mask(shape) ? n*shape.n_scoring : 0) + spec.set*n;
    float *      results = on_device<float>(places.results);
    size_t n_heads_before = 0;
    for (size_t j = 0; j < i; ++j) {
        n_heads_before += size_t(kept.layers()[part.layers[j]].n_head);
    }
    relevance_layer l = {};
    l.type       = type;
    l.index      = state.index->data;
    l.head_bytes = state.index->nb[2];
    l.ring       = static_cast<const float *>(state.ring->data);
    l.scoring    = queries;
    l.mask       = kept.has_mask(shape) ? mask : nullptr;
    l.frozen     = attends ? frozen : nullptr;
    l.head       = uint32_t(spec.head);
    l.n_head     = uint32_t(spec.n_head);
    l.n_head_kv  = uint32_t(spec.n_head_kv);
    l.n_rows     = shape.n_scored;
    l.n_queries  = shape.n_scoring;
    l.n_layers   = uint32_t(kept.layers().size());
    l.scale      = state.kq_scale;
    l.soft_cap   = kept.soft_cap;
    l.magnitude  = !attends;
    l.prompt_end = shape.prompt_end;
    l.is_first   = i == 0;
    l.mean       = results;
    l.peak       = results + n;
    l.missed     = attends ? results + 2*n + n_heads_before : nullptr;
    l.scratch    = on_device<void>(places.scratch);
    l.finished   = on_device<uint32_t>(places.finished);
    return l;
}

void scorer::before_writes() {
    if (!is_running) {
        return;
    }
    if (is_marked) {
        ggml_backend_event_wait(backend, scored.get());
    } else {
        const current_device chosen(number);
        check(cudaStreamSynchronize(stream.get()), "score");
    }
    is_running = false;
}

void scorer::wait() {
    if (stream) {
        const current_device chosen(number);
        check(cudaStreamSynchronize(stream.get()), "score");
        is_running = false;
    }
}

const bool added = add_scorer_kind({ is_cuda, make_scorer });

} // namespace

std::unique_ptr<device_scorer> make_scorer(const device_part & part) { return std::make_unique<scorer>(part); }

} // namespace asrkf::cuda
