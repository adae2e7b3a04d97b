// What the host code shares that queues kernels: errors, the current device, handles that end with their owner, and events of ggml,
// which hold one of CUDA's.
#pragma once

#include "cuda/kernels.h"

#include "common.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"

#include <cstring>
#include <memory>
#include <type_traits>

namespace asrkf::cuda {

inline bool succeeded(cudaError_t status) {
    if (status != cudaSuccess) {
        cudaGetLastError(); // it is told here: ggml, which aborts on what it finds, shall not find it
    }
    return status == cudaSuccess;
}

inline void check(cudaError_t status, const char * what) {
    if (!succeeded(status)) {
        throw error(ASRKF_INTERNAL, format("CUDA failed to %s: %s", what, cudaGetErrorString(status)));
    }
}

inline void check(failure why, const char * what) {
    if (why) {
        throw error(ASRKF_INTERNAL, format("CUDA failed to %s: %s", what, why));
    }
}

// The thread's current device, as long as this lives.
class current_device {
public:
    explicit current_device(int wanted) : wanted(wanted) {
        check(cudaGetDevice(&before), "name the current device");
        if (before != wanted) {
            check(cudaSetDevice(wanted), "choose a device");
        }
    }
    ~current_device() {
        if (before != wanted) {
            succeeded(cudaSetDevice(before)); // ggml chooses its own before it does anything
        }
    }
    current_device(const current_device &) = delete;
    current_device & operator=(const current_device &) = delete;

private:
    const int wanted;
    int       before = 0;
};

struct destroy {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
template <typename Handle> using owned = std::unique_ptr<std::remove_pointer_t<Handle>, destroy>;

// The device whose memory this is, as CUDA counts.
inline int number_of(const void * address) {
    cudaPointerAttributes attributes = {};
    check(cudaPointerGetAttributes(&attributes, address), "say whose memory it has");
    return attributes.device;
}

// A queue of the current device, which no other one waits for.
inline owned<cudaStream_t> new_stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make a stream");
    return owned<cudaStream_t>(stream);
}

// What ends waits for its work, if it has a queue; nobody else waits for it any more.
inline void finish(int number, cudaStream_t stream) {
    if (!stream) {
        return;
    }
    try {
        const current_device chosen(number);
        cudaStreamSynchronize(stream);
    } catch (const error &) {}
}

inline cudaEvent_t inside(const ggml_backend_event_ptr & event) { return static_cast<cudaEvent_t>(event->context); }

// The stream's further work comes after what the backend has been given by now.
inline void wait_for(ggml_backend_t backend, const ggml_backend_event_ptr & written, cudaStream_t stream) {
    if (!written) {
        return ggml_backend_synchronize(backend);
    }
    ggml_backend_event_record(written.get(), backend);
    check(cudaStreamWaitEvent(stream, inside(written), 0), "wait for the backend");
}

// ROCm and MUSA, which ggml builds from the same sources, go by other names.
inline bool is_cuda(ggml_backend_dev_t device) {
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    return reg && std::strcmp(ggml_backend_reg_name(reg), "CUDA") == 0;
}

} // namespace asrkf::cuda
