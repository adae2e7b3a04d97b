#include "cuda/outputs.h"

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace asrkf::cuda {

namespace {

constexpr size_t N_FIGURES = 3; // of a row: output_entropy()

class reader final : public output_reader {
public:
    reader(ggml_backend_dev_t device, uint32_t n_slots);
    ~reader() override;

    bool beats_host() const override { return true; }
    void read(ggml_backend_t backend, const ggml_tensor * logits, uint32_t row, uint32_t slot) override;
    asrkf_output of(uint32_t slot) override;

private:
    static double * figures(const ggml_backend_buffer_ptr & buffer, uint32_t slot) {
        return static_cast<double *>(ggml_backend_buffer_get_base(buffer.get())) + N_FIGURES*slot;
    }

    int                     number = 0; // of the device, as CUDA counts
    ggml_backend_buffer_ptr on_device, on_host;
    owned<cudaStream_t>     stream;
    ggml_backend_event_ptr  written, seen; // by the backend, and by us; null where the device makes none
};

reader::reader(ggml_backend_dev_t device, uint32_t n_slots) {
    const size_t n_bytes = N_FIGURES*sizeof(double)*n_slots;
    ggml_backend_buffer_type_t pinned = ggml_backend_dev_host_buffer_type(device);
    on_device.reset(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device), n_bytes));
    on_host.reset(ggml_backend_buft_alloc_buffer(pinned ? pinned : ggml_backend_cpu_buffer_type(), n_bytes));
    if (!on_device || !on_host) {
        throw error(ASRKF_INTERNAL, "no memory for what output rows say");
    }
    number = number_of(figures(on_device, 0));
    const current_device chosen(number);
    stream = new_stream();
    written.reset(ggml_backend_event_new(device));
    seen.reset(ggml_backend_event_new(device));
}

reader::~reader() { finish(number, stream.get()); }

void reader::read(ggml_backend_t backend, const ggml_tensor * logits, uint32_t row, uint32_t slot) {
    const current_device chosen(number);
    wait_for(backend, written, stream.get());
    const auto * first = reinterpret_cast<const float *>(static_cast<const uint8_t *>(logits->data) + row*logits->nb[1]);
    check(output_entropy(first, size_t(logits->ne[0]), uint32_t(logits->ne[0]), 1, figures(on_device, slot), stream.get()), "read an output");
    check(cudaMemcpyAsync(figures(on_host, slot), figures(on_device, slot), N_FIGURES*sizeof(double), cudaMemcpyDeviceToHost, stream.get()), "fetch an entropy");
    if (seen && succeeded(cudaEventRecord(inside(seen), stream.get()))) { // the next step's logits lie where these do
        ggml_backend_event_wait(backend, seen.get());
    } else {
        check(cudaStreamSynchronize(stream.get()), "read an output");
    }
}

asrkf_output reader::of(uint32_t slot) {
    const current_device chosen(number);
    check(cudaStreamSynchronize(stream.get()), "read an output");
    const double * found = figures(on_host, slot);
    return { sizeof(asrkf_output), found[0], found[1], found[2] };
}

const bool added = add_output_reader_kind({ is_cuda, make_output_reader });

} // namespace

std::unique_ptr<output_reader> make_output_reader(ggml_backend_dev_t device, uint32_t n_slots) { return std::make_unique<reader>(device, n_slots); }

} // namespace asrkf::cuda
