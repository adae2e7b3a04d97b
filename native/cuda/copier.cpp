#include "cuda/copier.h"

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace asrkf::cuda {

namespace {

class copier final : public row_copier {
public:
    explicit copier(ggml_backend_dev_t device);
    ~copier() override { finish(number, stream.get()); }

    bool reaches(const void * host) const override;
    void copy(ggml_backend_t backend, uint8_t * crossing, uint32_t n_slices, uint32_t most_rows, bool to_crossing) override;

private:
    int                    number = 0; // of the device, as CUDA counts
    owned<cudaStream_t>    stream;
    ggml_backend_event_ptr given, moved; // by the backend, and by us; null where the device makes none
};

copier::copier(ggml_backend_dev_t device) {
    const ggml_backend_buffer_ptr some(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device), 1));
    if (!some) {
        throw error(ASRKF_INTERNAL, "no memory on the device");
    }
    number = number_of(ggml_backend_buffer_get_base(some.get()));
    const current_device chosen(number);
    if (const failure why = lacks_row_kernel()) {
        throw error(ASRKF_UNSUPPORTED, format("this build has no kernel for the device (%s)", why));
    }
    stream = new_stream();
    given.reset(ggml_backend_event_new(device));
    moved.reset(ggml_backend_event_new(device));
}

bool copier::reaches(const void * host) const {
    cudaPointerAttributes attributes = {};
    return succeeded(cudaPointerGetAttributes(&attributes, host)) && attributes.type == cudaMemoryTypeHost;
}

void copier::copy(ggml_backend_t backend, uint8_t * crossing, uint32_t n_slices, uint32_t most_rows, bool to_crossing) try {
    const current_device chosen(number);
    wait_for(backend, given, stream.get());
    check(move_rows(crossing, n_slices, most_rows, to_crossing, stream.get()), "move rows");
    if (moved && succeeded(cudaEventRecord(inside(moved), stream.get()))) {
        ggml_backend_event_wait(backend, moved.get());
    } else {
        check(cudaStreamSynchronize(stream.get()), "move rows");
    }
} catch (const error & e) {
    throw error(ASRKF_MOVE_FAILED, e.what());
}

const bool added = add_row_copier_kind({ is_cuda, make_row_copier });

} // namespace

std::unique_ptr<row_copier> make_row_copier(ggml_backend_dev_t device) { return std::make_unique<copier>(device); }

} // namespace asrkf::cuda
