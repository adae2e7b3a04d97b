// The part of CUDA that the kernels of native/cuda/ use, on a CPU, so that the kernels' own source runs where no card is. Not a model of a GPU: it
// shows what the kernels compute, and nothing of their speed, of memory that must be the device's, or of real concurrency.
//
// Blocks run one after the other. A block's threads are fibers, which change at barriers and shuffles only. shim::order says in which
// order; `uneven` lets some threads sleep until all others wait for them, again and again: the most that a barrier has to hold.
// A result that needs a barrier which is missing differs between the orders.
#pragma once

#include "cuda_shim_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#    include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static // blocks run one after the other, in one thread

struct alignas(16) uint4 { uint32_t x, y, z, w; };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum class order { ascending, descending, uneven };
inline order    thread_order = order::ascending;
inline uint32_t seed         = 1;

constexpr uint32_t WARP        = 32;
constexpr size_t   STACK_BYTES = 128*1024;

struct barrier { uint32_t n_arrived = 0, generation = 0; };

struct fiber {
    ucontext_t                 context;
    std::unique_ptr<uint8_t[]> stack;
    dim3                       index;
    bool                       done       = false;
    const barrier *            waits_for  = nullptr;
    uint32_t                   generation = 0; // of what it waits for
};

struct block {
    std::vector<fiber>    fibers;
    std::vector<barrier>  warps;
    barrier               all;
    std::vector<uint64_t> slots;   // of shuffles, by thread
    ucontext_t            scheduler;
    size_t                current = 0;
    std::function<void()> body;
    const void *          scheduler_stack = nullptr; // for the address sanitizer, which has to know whose stack is in use
    size_t                scheduler_size  = 0;
};
inline block * running = nullptr;

inline void fatal(const char * what) {
    std::fprintf(stderr, "cuda_shim: %s\n", what);
    std::abort();
}

// From a fiber back to the scheduler, until it is this fiber's turn again.
inline void yield(bool for_good = false) {
    block & b = *running;
#if defined(__SANITIZE_ADDRESS__)
    void * fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, b.scheduler_stack, b.scheduler_size);
#endif
    swapcontext(&b.fibers[b.current].context, &b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &b.scheduler_stack, &b.scheduler_size);
#endif
    (void) for_good;
}

inline void wait(barrier & at, uint32_t n_threads) {
    fiber & me = running->fibers[running->current];
    if (++at.n_arrived == n_threads) {
        at.n_arrived = 0;
        at.generation++;
    }
    me.waits_for  = &at;
    me.generation = at.generation - (at.n_arrived == 0);
    yield(); // also the last one: who goes on first is the order's choice
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running->scheduler_stack, &running->scheduler_size);
#endif
    running->body();
    running->fibers[running->current].done = true;
    yield(true);
}

inline void resume(block & b, size_t i) {
    b.current = i;
    threadIdx = b.fibers[i].index;
#if defined(__SANITIZE_ADDRESS__)
    void * fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, b.fibers[i].stack.get(), STACK_BYTES);
#endif
    swapcontext(&b.scheduler, &b.fibers[i].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void start_fibers(block & b) {
    for (fiber & f : b.fibers) {
        f.done      = false;
        f.waits_for = nullptr;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.get();
        f.context.uc_stack.ss_size = STACK_BYTES;
        f.context.uc_link          = nullptr;
        makecontext(&f.context, fiber_main, 0);
    }
    b.all = {};
    b.warps.assign((b.fibers.size() + WARP - 1) / WARP, {});
}

// Every thread that can go on, once, but for those asleep. Returns how many could.
inline size_t run_round(block & b, const std::vector<size_t> & turns, const std::vector<bool> & asleep) {
    size_t n_moved = 0;
    for (const size_t i : turns) {
        fiber & f = b.fibers[i];
        if (!asleep[i] && !f.done && (!f.waits_for || f.waits_for->generation != f.generation)) {
            f.waits_for = nullptr;
            resume(b, i);
            n_moved++;
        }
    }
    return n_moved;
}

// Until all threads of the block have returned. A barrier that some of them never reach is a fault, as it is on a card.
inline void run_block(block & b, std::mt19937 & random) {
    start_fibers(b);
    const size_t n = b.fibers.size();
    std::vector<size_t> turns(n);
    std::vector<bool>   asleep(n, false);
    for (size_t i = 0; i < n; ++i) {
        turns[i] = thread_order == order::descending ? n - 1 - i : i;
    }
    while (!std::all_of(b.fibers.begin(), b.fibers.end(), [](const fiber & f) { return f.done; })) {
        if (thread_order == order::uneven) { // a warp, or any of all threads
            const size_t warp = random() % b.warps.size();
            const bool   whole = random() % 2;
            for (size_t i = 0; i < n; ++i) {
                asleep[i] = whole ? i / WARP == warp : random() % 4 == 0;
            }
            std::shuffle(turns.begin(), turns.end(), random);
            while (run_round(b, turns, asleep) > 0) {}
            asleep.assign(n, false);
        }
        if (run_round(b, turns, asleep) == 0 && !std::all_of(b.fibers.begin(), b.fibers.end(), [](const fiber & f) { return f.done; })) {
            fatal("threads wait at a barrier that others never reach");
        }
    }
}

inline void run_grid(const cudaLaunchConfig_t & config, std::function<void()> body) {
    block b;
    b.body = std::move(body);
    b.fibers.resize(config.blockDim.x);
    b.slots.resize(config.blockDim.x);
    for (uint32_t i = 0; i < config.blockDim.x; ++i) {
        b.fibers[i].stack.reset(new uint8_t[STACK_BYTES]); // not zeroed
        b.fibers[i].index = dim3(i, 0, 0);
    }
    std::mt19937 random(seed);
    running  = &b;
    gridDim  = config.gridDim;
    blockDim = config.blockDim;
    std::vector<uint32_t> blocks(size_t(gridDim.x)*gridDim.y);
    for (uint32_t i = 0; i < blocks.size(); ++i) {
        blocks[i] = i;
    }
    if (thread_order == order::descending) {
        std::reverse(blocks.begin(), blocks.end());
    } else if (thread_order == order::uneven) {
        std::shuffle(blocks.begin(), blocks.end(), random);
    }
    for (const uint32_t i : blocks) {
        blockIdx = dim3(i % gridDim.x, i / gridDim.x, 0);
        run_block(b, random);
    }
    running = nullptr;
}

} // namespace shim

inline void __syncthreads() { shim::wait(shim::running->all, uint32_t(shim::running->fibers.size())); }
inline void __threadfence() {}

template <typename T> T __shfl_xor_sync(uint32_t mask, T value, int distance) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a slot");
    shim::block & b = *shim::running;
    const size_t me = b.current, warp = me / shim::WARP;
    if (mask != 0xffffffffu) {
        shim::fatal("shuffles of parts of a warp are not here");
    }
    std::memcpy(&b.slots[me], &value, sizeof(T));
    shim::wait(b.warps[warp], shim::WARP);
    T other;
    std::memcpy(&other, &b.slots[me ^ size_t(distance)], sizeof(T));
    shim::wait(b.warps[warp], shim::WARP); // all have read
    return other;
}

inline uint32_t atomicAdd(uint32_t * at, uint32_t value) { const uint32_t before = *at; *at += value; return before; }

struct __half { uint16_t bits; };
inline __half __ushort_as_half(uint16_t bits) { return { bits }; }
inline float __half2float(__half h) {
    const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    if (exponent == 0) {
        return std::ldexp(sign ? -float(fraction) : float(fraction), -24);
    }
    const uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t * config, void (*kernel)(Wanted...), Given... arguments) {
    shim::n_launches++;
    if (const cudaError_t failed = shim::status(); failed != cudaSuccess) {
        return failed;
    }
    const dim3 grid = config->gridDim, threads = config->blockDim; // a card's limits
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z != 1 || threads.x == 0 || threads.x > 1024 || threads.y != 1) {
        return cudaErrorInvalidConfiguration;
    }
    shim::give(config->stream, [grid = *config, kernel, arguments...] { shim::run_grid(grid, [=] { kernel(arguments...); }); });
    return cudaSuccess;
}
