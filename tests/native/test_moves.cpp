// Host store and row mover on ggml's CPU backend: bytes, budget, both transfer modes.
#include "check.h"

#include "store/host_store.h"
#include "store/row_mover.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"

#include <cstring>
#include <random>

using namespace asrkf;

namespace {

struct cache {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    std::vector<ggml_tensor *> tensors;

    cache(ggml_type type, int64_t row, int64_t n_cells, int n_tensors) {
        ggml_init_params params = { size_t(n_tensors + 1)*ggml_tensor_overhead(), nullptr, true };
        ctx.reset(ggml_init(params));
        for (int i = 0; i < n_tensors; ++i) {
            tensors.push_back(ggml_new_tensor_2d(ctx.get(), type, row, n_cells));
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    }

    // a distinct value in every row, signalling NaNs among them when read as F32
    void fill(uint32_t seed) {
        std::mt19937 random(seed);
        for (ggml_tensor * t : tensors) {
            auto * bytes = static_cast<uint8_t *>(t->data);
            for (size_t i = 0; i < ggml_nbytes(t); ++i) {
                bytes[i] = uint8_t(random());
            }
            for (size_t i = 0; i + 4 <= ggml_nbytes(t); i += 64) {
                const uint32_t nan = 0x7fa00000u | (random() & 0xffff) | 1;
                std::memcpy(bytes + i, &nan, 4);
            }
        }
    }

    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> all;
        for (const ggml_tensor * t : tensors) {
            all.insert(all.end(), static_cast<uint8_t *>(t->data), static_cast<uint8_t *>(t->data) + ggml_nbytes(t));
        }
        return all;
    }
};

void round_trip(ggml_type type, int64_t row, moves_kind kind) {
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    cache c(type, row, 300, 5);
    c.fill(uint32_t(type)*7 + 1);
    const auto original = c.bytes();
    row_mover mover(c.tensors, kind);
    mover.attach({ backend.get() });
    CHECK(mover.is_staged() == (kind == MOVES_STAGED));
    host_budget budget;
    host_store store(mover.token_bytes(), ggml_backend_cpu_buffer_type(), budget);

    std::vector<uint32_t> cells;
    for (uint32_t i = 0; i < 300; i += 2) { // more than one staging buffer, and not a multiple of it
        cells.push_back((i*37) % 300);
    }
    std::vector<uint8_t *> hosts;
    store.reserve(cells.size());
    for (size_t i = 0; i < cells.size(); ++i) {
        hosts.push_back(store.data(store.acquire()));
    }
    mover.get(cells.data(), hosts.data(), cells.size());
    CHECK(c.bytes() == original);
    for (const uint32_t cell : cells) { // the device forgets
        for (ggml_tensor * t : c.tensors) {
            std::memset(static_cast<uint8_t *>(t->data) + cell*t->nb[1], 0xEE, t->nb[1]);
        }
    }
    CHECK(c.bytes() != original);
    mover.set(cells.data(), hosts.data(), cells.size());
    CHECK(c.bytes() == original);
}

} // namespace

TEST(every_type, "rows come back byte for byte, for every cache type, direct and staged") {
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
        for (const moves_kind kind : { MOVES_DIRECT, MOVES_STAGED }) {
            round_trip(type, 192, kind);
            round_trip(type, 1024, kind);
        }
    }
}

TEST(odd_rows, "rows that are no whole number of F32 words move one by one, byte for byte") {
    round_trip(GGML_TYPE_Q8_0, 32, MOVES_STAGED); // 34 bytes
    round_trip(GGML_TYPE_F16, 63, MOVES_STAGED);  // 126 bytes
}

TEST(mixed_rows, "a token's bytes are its rows in the order of the tensors") {
    cache c(GGML_TYPE_F16, 64, 16, 3);
    c.fill(3);
    row_mover mover(c.tensors, MOVES_AUTO);
    CHECK(!mover.is_staged());
    CHECK(mover.token_bytes() == 3*128);
    std::vector<uint8_t> out(mover.token_bytes());
    uint8_t * host = out.data();
    const uint32_t cell = 9;
    mover.get(&cell, &host, 1);
    for (size_t i = 0; i < 3; ++i) {
        CHECK(std::memcmp(out.data() + i*128, static_cast<uint8_t *>(c.tensors[i]->data) + 9*128, 128) == 0);
    }
}

TEST(budget_exact, "a store never allocates over its limit, and says what would help") {
    host_budget budget;
    budget.limit_bytes = 10*1000 + 999;
    host_store store(1000, ggml_backend_cpu_buffer_type(), budget);
    store.reserve(10);
    CHECK(budget.used_bytes <= budget.limit_bytes);
    std::vector<uint32_t> slots;
    for (int i = 0; i < 10; ++i) {
        slots.push_back(store.acquire());
    }
    CHECK(thrown([&] { store.reserve(1); }).find("raise host_limit") != std::string::npos);
    CHECK(store.n_used() == 10 && budget.used_bytes <= budget.limit_bytes);
    store.release(slots[4]);
    store.reserve(1);
    CHECK(store.acquire() == slots[4]);
}

TEST(arenas_back, "clear gives the arenas back, and the peak remembers them") {
    host_budget budget;
    {
        host_store store(4096, ggml_backend_cpu_buffer_type(), budget);
        store.reserve(5000);
        CHECK(budget.used_bytes >= 5000u*4096u);
        store.clear();
        CHECK(budget.used_bytes == 0 && budget.peak_bytes >= 5000u*4096u);
        store.reserve(1);
        CHECK(budget.used_bytes > 0);
    }
    CHECK(budget.used_bytes == 0);
}

TEST(distinct_slots, "slots do not overlap") {
    host_budget budget;
    host_store store(64, ggml_backend_cpu_buffer_type(), budget);
    const uint32_t n = 200000;
    store.reserve(n);
    std::vector<uint32_t> slots;
    for (uint32_t i = 0; i < n; ++i) {
        slots.push_back(store.acquire());
        std::memset(store.data(slots.back()), 0, 64);
        std::memcpy(store.data(slots.back()), &i, 4);
        std::memcpy(store.data(slots.back()) + 60, &i, 4);
    }
    bool same = true;
    for (uint32_t i = 0; i < n; ++i) {
        same = same && std::memcmp(store.data(slots[i]), &i, 4) == 0 && std::memcmp(store.data(slots[i]) + 60, &i, 4) == 0;
    }
    CHECK(same);
}

int main() { return run_all_tests(); }
