// The part of CUDA's runtime that native/cuda/ uses, on a CPU: streams that do nothing until somebody waits for them, events, copies. No
// memory is a device's, so what a copy forgets is shown by its values only. One device, number 0.
#pragma once

#include "delayed_queue.h"

#include <cstdint>
#include <cstring>

struct dim3 {
    uint32_t x, y, z;
    dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
using cudaStream_t = delayed_queue *; // null: what it is given is done at once
using cudaEvent_t  = delayed_event *; // as the devices of delaying.h have them, too
struct cudaLaunchConfig_t {
    dim3         gridDim, blockDim;
    size_t       dynamicSmemBytes = 0;
    cudaStream_t stream           = nullptr;
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
struct cudaPointerAttributes {
    cudaMemoryType type;
    int            device;
};
struct cudaFuncAttributes {};

namespace shim {

inline bool     delays     = false; // streams that are made from now on wait until somebody waits for them
inline bool     pins       = true;  // host memory is said to be pinned
inline int      fail_in    = 0;     // the n-th call from now on that may fail does; 0: none
inline int      device     = 0;     // the current one
inline uint64_t n_launches = 0;
inline int64_t  n_alive    = 0;     // streams and events
inline uint64_t n_left     = 0;     // streams that ended with work under way, which on a card goes on

inline cudaError_t status() { return fail_in > 0 && --fail_in == 0 ? cudaErrorLaunchFailure : cudaSuccess; }

inline void give(cudaStream_t stream, std::function<void()> job) {
    if (stream) {
        stream->later(std::move(job));
    } else {
        job();
    }
}

template <typename Body> cudaError_t unless_failing(Body body) {
    const cudaError_t found = status();
    if (found == cudaSuccess) {
        body();
    }
    return found;
}

} // namespace shim

inline const char * cudaGetErrorString(cudaError_t e) { return e == cudaErrorInvalidConfiguration ? "invalid configuration argument" : e == cudaErrorInvalidDevice ? "invalid device ordinal" : "unspecified launch failure"; }
inline cudaError_t  cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int * out) { return shim::unless_failing([&] { *out = shim::device; }); }
inline cudaError_t cudaSetDevice(int device) { return shim::unless_failing([&] { shim::device = device; }); }
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes * out, const void *) { return shim::unless_failing([&] { *out = { shim::pins ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered, 0 }; }); }
template <typename... Wanted> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, void (*)(Wanted...)) { return shim::status(); }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t * out, unsigned) {
    return shim::unless_failing([&] {
        *out = new delayed_queue;
        (*out)->at_once = !shim::delays;
        shim::n_alive++;
    });
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    shim::n_left += stream->n_waiting() > 0;
    delete stream;
    shim::n_alive--;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return shim::unless_failing([&] { stream->work(); }); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t * out, unsigned) {
    return shim::unless_failing([&] {
        *out = new delayed_event;
        shim::n_alive++;
    });
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    shim::n_alive--;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return shim::unless_failing([&] { event->record(*stream); }); }
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return shim::unless_failing([&] { event->synchronize(); }); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) { return shim::unless_failing([&] { event->hold_back(*stream); }); }
inline cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t n, cudaMemcpyKind, cudaStream_t stream) {
    return shim::unless_failing([&] { shim::give(stream, [=] { std::memcpy(to, from, n); }); });
}
