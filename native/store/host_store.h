// Host RAM for frozen tokens: slots of one token's raw cache bytes, in arenas that grow, under one limit.
// Knows ggml's buffers (pinned memory where the device offers it), no model and no policy.
#pragma once

#include "common.h"

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

class row_mover;

// Bytes of all host stores of one context, measured as allocated.
struct host_budget {
    uint64_t limit_bytes = 0; // 0: none
    uint64_t used_bytes  = 0;
    uint64_t peak_bytes  = 0;
    bool     is_pageable = false; // memory that was to be pinned is not: ggml falls back in silence
};

// Host memory of this type, null: of any; nullptr if there is none. Notes in the budget what ggml gave instead.
ggml_backend_buffer_t allocate_host(ggml_backend_buffer_type_t buft, size_t n_bytes, host_budget & budget);

// For tests: the n-th arena of this thread from now on cannot be allocated; 0: none.
extern thread_local uint32_t fail_arena_in;

class host_store {
public:
    // buft: where arenas are allocated; it must give memory that the host can read. mover: fills slots, and dies before the store.
    host_store(size_t slot_bytes, ggml_backend_buffer_type_t buft, host_budget & budget, row_mover * mover = nullptr);
    ~host_store();
    host_store(const host_store &) = delete;
    host_store & operator=(const host_store &) = delete;

    // Make sure that n slots can be acquired; throws error(ASRKF_HOST_LIMIT or ASRKF_INTERNAL) and then nothing changed
    // but, at most, the number of free slots.
    void reserve(size_t n);
    // A slot; never fails after reserve().
    uint32_t acquire();
    void     release(uint32_t slot);
    bool     clear(); // all slots are free, all arenas given back; false: there were none

    // A slot's bytes. They may still be on their way to it: this waits for them.
    uint8_t * data(uint32_t slot) const;
    // Where they are, for a mover.
    uint8_t * address(uint32_t slot) const { return where[slot]; }
    size_t n_used() const { return where.size() - free_slots.size(); }

private:
    bool grow(size_t wanted); // by one arena
    void free_arenas();

    const size_t                       slot_bytes;
    const ggml_backend_buffer_type_t   buft;
    host_budget &                      budget;
    row_mover * const                  mover;
    std::vector<ggml_backend_buffer_t> arenas;
    std::vector<uint8_t *>             where;      // of each slot; arenas never move
    std::vector<uint32_t>              free_slots; // the last is taken first
};

} // namespace asrkf
