#include "store/host_store.h"

#include "store/row_mover.h"

#include <algorithm>

namespace asrkf {

// large enough for few allocations, small enough that the reported bytes follow the frozen ones
constexpr size_t ARENA_BYTES = 4u << 20;

thread_local uint32_t fail_arena_in = 0;

ggml_backend_buffer_t allocate_host(ggml_backend_buffer_type_t buft, size_t n_bytes, host_budget & budget) {
    buft = buft ? buft : ggml_backend_cpu_buffer_type();
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft, n_bytes);
    budget.is_pageable = budget.is_pageable || (buffer && ggml_backend_buffer_get_type(buffer) != buft);
    return buffer;
}

host_store::host_store(size_t slot_bytes, ggml_backend_buffer_type_t buft, host_budget & budget, row_mover * mover)
    : slot_bytes(slot_bytes), buft(buft), budget(budget), mover(mover) {}

host_store::~host_store() { free_arenas(); }

bool host_store::grow(size_t wanted) {
    size_t n = std::max<size_t>(1, ARENA_BYTES / slot_bytes);
    n = std::max(n, std::min(wanted, 4*n));
    if (budget.limit_bytes) { // several stores share it: none may take much ahead of need
        n = std::max(std::min(wanted, n), std::min(n, size_t(budget.limit_bytes / 32 / slot_bytes)));
        const uint64_t left = budget.limit_bytes - std::min(budget.limit_bytes, budget.used_bytes);
        n = std::min<size_t>(n, size_t(left / slot_bytes));
        if (n == 0) {
            return false;
        }
    }
    arenas.reserve(arenas.size() + 1); // before anything is taken; and no slot that is released needs memory
    where.reserve(where.size() + n);
    free_slots.reserve(where.size() + n);
    const bool fails = fail_arena_in > 0 && --fail_arena_in == 0;
    ggml_backend_buffer_t arena = fails ? nullptr : allocate_host(buft, n*slot_bytes, budget);
    if (!arena) {
        throw error(ASRKF_INTERNAL, format("the host store could not allocate %zu bytes (%s): free host memory or set host_limit",
                n*slot_bytes, ggml_backend_buft_name(buft)));
    }
    auto * base = static_cast<uint8_t *>(ggml_backend_buffer_get_base(arena));
    arenas.push_back(arena);
    budget.used_bytes += ggml_backend_buffer_get_size(arena);
    budget.peak_bytes  = std::max(budget.peak_bytes, budget.used_bytes);
    const size_t first = where.size();
    for (size_t i = 0; i < n; ++i) {
        where.push_back(base + i*slot_bytes);
    }
    for (size_t i = n; i-- > 0; ) { // lowest slot is taken first
        free_slots.push_back(uint32_t(first + i));
    }
    return true;
}

void host_store::reserve(size_t n) {
    while (free_slots.size() < n) {
        if (!grow(n - free_slots.size())) {
            throw error(ASRKF_HOST_LIMIT, format("host_limit of %llu bytes is reached: %llu are in use and %zu more tokens of %zu bytes need room: "
                    "raise host_limit, raise kv_pool, or remove tokens", (unsigned long long) budget.limit_bytes,
                    (unsigned long long) budget.used_bytes, n - free_slots.size(), slot_bytes));
        }
    }
}

uint32_t host_store::acquire() {
    if (free_slots.empty()) {
        reserve(1);
    }
    const uint32_t slot = free_slots.back();
    free_slots.pop_back();
    return slot;
}

void host_store::release(uint32_t slot) { free_slots.push_back(slot); }

uint8_t * host_store::data(uint32_t slot) const {
    if (mover) {
        mover->settle();
    }
    return where[slot];
}

bool host_store::clear() {
    if (mover) {
        mover->settle();
    }
    const bool had_arenas = !arenas.empty();
    free_arenas();
    return had_arenas;
}

void host_store::free_arenas() {
    for (ggml_backend_buffer_t arena : arenas) {
        budget.used_bytes -= ggml_backend_buffer_get_size(arena);
        ggml_backend_buffer_free(arena);
    }
    arenas.clear();
    where.clear();
    free_slots.clear();
}

} // namespace asrkf
