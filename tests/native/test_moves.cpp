// Host store and row mover on ggml's CPU backend, and on a device that delays: bytes, budget, both transfer modes; there rows are moved by
// a graph, or by the CUDA copier, whose kernel runs on the CPU (cuda_shim.h).
#include "check.h"
#include "delaying.h"

#include "cuda/copier.h"
#include "cuda/kernels.h"
#include "store/host_store.h"
#include "store/row_mover.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"

#include <cstring>
#include <random>
#include <utility>

using namespace asrkf;

namespace {

// Who moves rows on a device that delays.
enum class way { graph, copier, copier_unpinned };
constexpr way ALL_WAYS[] = { way::graph, way::copier, way::copier_unpinned };

bool wants_copier = false;
const bool added  = add_row_copier_kind({ [](ggml_backend_dev_t) { return wants_copier; }, cuda::make_row_copier });

struct cache {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    std::vector<ggml_tensor *> tensors;

    cache(ggml_type type, int64_t row, int64_t n_cells, int n_tensors, ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type()) {
        ggml_init_params params = { size_t(n_tensors + 1)*ggml_tensor_overhead(), nullptr, true };
        ctx.reset(ggml_init(params));
        for (int i = 0; i < n_tensors; ++i) {
            tensors.push_back(ggml_new_tensor_2d(ctx.get(), type, row, n_cells));
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
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

std::vector<uint32_t> some_cells(uint32_t n, uint32_t step) {
    std::vector<uint32_t> cells;
    for (uint32_t i = 0; i < n; i += step) {
        cells.push_back((i*37) % n);
    }
    return cells;
}

// The device forgets these cells.
void forget(const cache & c, const std::vector<uint32_t> & cells) {
    for (const uint32_t cell : cells) {
        for (ggml_tensor * t : c.tensors) {
            std::memset(static_cast<uint8_t *>(t->data) + cell*t->nb[1], 0xEE, t->nb[1]);
        }
    }
}

void round_trip(ggml_type type, int64_t row, moves_kind kind) {
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    cache c(type, row, 300, 5);
    c.fill(uint32_t(type)*7 + 1);
    const auto original = c.bytes();
    host_budget budget;
    row_mover mover({ c.tensors }, kind, budget);
    mover.attach({ backend.get() });
    CHECK(mover.is_staged(0) == (kind == MOVES_STAGED));
    host_store store(mover.token_bytes(0), ggml_backend_cpu_buffer_type(), budget);

    const std::vector<uint32_t> cells = some_cells(300, 2); // more than one staging buffer, and not a multiple of it
    std::vector<row_mover::row> rows;
    store.reserve(cells.size());
    for (const uint32_t cell : cells) {
        rows.push_back({ 0, cell, store.data(store.acquire()) });
    }
    mover.get(rows);
    mover.settle();
    CHECK(c.bytes() == original);
    forget(c, cells);
    CHECK(c.bytes() != original);
    mover.set(rows);
    CHECK(c.bytes() == original);
}

// Twelve groups of three sizes on a device that delays, with a slot for each cell of each.
struct delayed_groups {
    delaying_device device;
    std::vector<std::unique_ptr<cache>> caches;
    host_budget budget;
    std::unique_ptr<row_mover> mover;
    std::vector<std::unique_ptr<host_store>> stores;

    static constexpr uint32_t N_CELLS = 300;
    static constexpr size_t   N_GROUPS = 12;

    explicit delayed_groups(way w = way::graph) {
        shim::delays = true;
        wants_copier = w != way::graph;
        shim::pins   = w == way::copier;
    }
    void make() {
        std::vector<std::vector<ggml_tensor *>> tensors;
        for (int ig = 0; ig < int(N_GROUPS); ++ig) {
            caches.push_back(std::make_unique<cache>(GGML_TYPE_F16, 64 << ig % 3, N_CELLS, 2 + 2*(ig % 3), &device.memory));
            caches.back()->fill(uint32_t(ig) + 1);
            tensors.push_back(caches.back()->tensors);
        }
        mover = std::make_unique<row_mover>(tensors, MOVES_AUTO, budget);
        mover->attach({ &device.backend });
        for (size_t ig = 0; ig < N_GROUPS; ++ig) {
            CHECK(mover->is_staged(ig));
            stores.push_back(std::make_unique<host_store>(mover->token_bytes(ig), &device.pinned, budget, mover.get()));
            stores[ig]->reserve(N_CELLS);
            for (uint32_t cell = 0; cell < N_CELLS; ++cell) {
                std::memset(stores[ig]->address(stores[ig]->acquire()), 0, mover->token_bytes(ig)); // the n-th slot is n
            }
        }
    }
    ~delayed_groups() { mover.reset(); } // before the stores

    std::vector<row_mover::row> rows(const std::vector<uint32_t> & cells) const {
        std::vector<row_mover::row> result;
        for (size_t ig = 0; ig < N_GROUPS; ++ig) {
            for (const uint32_t cell : cells) {
                result.push_back({ ig, cell, stores[ig]->address(cell) });
            }
        }
        return result;
    }
    std::vector<std::vector<uint8_t>> bytes() const {
        std::vector<std::vector<uint8_t>> all;
        for (const auto & c : caches) {
            all.push_back(c->bytes());
        }
        return all;
    }

    // As a graph of the model would, in the backend's queue.
    void overwrite(const std::vector<uint32_t> & cells) {
        device.queue.later([this, cells] {
            for (const auto & c : caches) {
                forget(*c, cells);
            }
        });
    }
    // What the cells were when the caches were filled.
    bool hold_originals(const std::vector<uint32_t> & cells, bool at_address) const {
        for (size_t ig = 0; ig < N_GROUPS; ++ig) {
            cache original(GGML_TYPE_F16, 64 << ig % 3, N_CELLS, 2 + 2*int(ig % 3));
            original.fill(uint32_t(ig) + 1);
            for (const uint32_t cell : cells) {
                const uint8_t * host = at_address ? stores[ig]->address(cell) : stores[ig]->data(cell);
                for (const ggml_tensor * t : original.tensors) {
                    if (std::memcmp(host, static_cast<const uint8_t *>(t->data) + cell*t->nb[1], t->nb[1]) != 0) {
                        return false;
                    }
                    host += t->nb[1];
                }
            }
        }
        return true;
    }
};

} // namespace

TEST(delayed, "on a device that works only when it is waited for, rows are gathered before their cells are overwritten, and are there when they are read") {
    for (const auto & [uploads_first, w] : { std::pair(false, way::graph), { true, way::graph }, { false, way::copier }, { true, way::copier }, { false, way::copier_unpinned } }) {
        for (const uint32_t step : { 20, 1 }) { // in one piece, in several
            delayed_groups g(w);
            g.device.uploads_first = uploads_first;
            g.make();
            const auto cells = some_cells(delayed_groups::N_CELLS, step);
            const auto before = g.bytes();
            g.mover->get(g.rows(cells));
            g.overwrite(cells);
            CHECK(g.device.queue.n_waiting() > 0 && g.bytes() == before);
            CHECK(!g.hold_originals(cells, /*at_address*/ true)); // nobody has waited
            CHECK(g.hold_originals(cells, /*at_address*/ false));
            CHECK(g.device.queue.n_waiting() == 1 && g.bytes() == before); // for no more than that
            g.mover->set(g.rows(cells));
            g.overwrite({ cells[0] });
            for (const auto & r : g.rows(cells)) { // the host's bytes may go at once
                std::memset(r.host, 0xDD, g.mover->token_bytes(r.group));
            }
            CHECK(g.bytes() != before || g.device.queue.n_waiting() > 1);
            ggml_backend_synchronize(&g.device.backend);
            g.mover->get(g.rows({ cells.begin() + 1, cells.end() }));
            CHECK(g.hold_originals({ cells.begin() + 1, cells.end() }, false));
            CHECK(!g.hold_originals({ cells[0] }, false));
        }
    }
}

TEST(exchanged, "what leaves and what comes back cross in one decision, though nothing has moved before both are queued") {
    for (const auto & [uploads_first, w] : { std::pair(false, way::graph), { true, way::graph }, { false, way::copier }, { true, way::copier }, { true, way::copier_unpinned } }) {
        delayed_groups g(w);
        g.device.uploads_first = uploads_first;
        g.make();
        const auto before = g.bytes();
        std::vector<uint32_t> out, in;
        for (uint32_t i = 0; i < 20; ++i) {
            out.push_back(i*7);
            in.push_back(250 + i);
        }
        g.mover->get(g.rows(in)); // as if frozen earlier
        CHECK(g.hold_originals(in, false));
        for (int round = 0; round < 3; ++round) { // each decision after the other, and their queues never empty
            g.mover->settle();
            g.mover->get(g.rows(out));
            auto back = g.rows(in);
            for (size_t i = 0; i < back.size(); ++i) {
                back[i].cell = out[i % out.size()]; // into the cells that have just been left
            }
            g.mover->set(back);
            CHECK(g.device.queue.n_waiting() > 0);
            CHECK(g.hold_originals(out, false));
            g.mover->get(g.rows(out)); // they hold the others' rows now
            g.mover->settle();
            bool same = true;
            for (size_t ig = 0; ig < delayed_groups::N_GROUPS; ++ig) {
                for (size_t i = 0; i < out.size(); ++i) {
                    same = same && std::memcmp(g.stores[ig]->data(out[i]), g.stores[ig]->data(in[i]), g.mover->token_bytes(ig)) == 0;
                }
            }
            CHECK(same && g.bytes() != before);
            for (size_t ig = 0; ig < delayed_groups::N_GROUPS; ++ig) {
                g.caches[ig]->fill(uint32_t(ig) + 1);
            }
        }
    }
}

TEST(few_calls, "a call is one upload, one graph and one download, whatever the number of groups; a larger one goes in pieces") {
    delayed_groups g;
    g.make();
    g.mover->get(g.rows(some_cells(64, 1)));
    CHECK(g.device.n_uploads == 1 && g.device.n_graphs == 1 && g.device.n_downloads == 1);
    g.mover->settle();
    g.mover->set(g.rows(some_cells(64, 1)));
    CHECK(g.device.n_uploads == 2 && g.device.n_graphs == 2 && g.device.n_downloads == 1);
    g.mover->get(g.rows(some_cells(300, 1))); // of 64 each
    CHECK(g.device.n_graphs == 2 + 5 && g.device.n_downloads == 1 + 5);
    std::vector<row_mover::row> one_group;
    for (uint32_t cell = 0; cell < 100; ++cell) { // a group alone has all of the buffer
        one_group.push_back({ 0, cell, g.stores[0]->address(cell) });
    }
    g.mover->get(one_group);
    CHECK(g.device.n_graphs == 2 + 5 + 1);
    CHECK(g.hold_originals(some_cells(300, 1), false));
}

TEST(one_launch, "a copier that reaches the host's memory takes one launch a call, and no staging buffer; one that does not uploads and downloads") {
    for (const way w : { way::copier, way::copier_unpinned }) {
        delayed_groups g(w);
        g.make();
        const bool reaches = w == way::copier;
        CHECK((g.mover->staging_bytes() == 0) == reaches && g.mover->notes().empty());
        const uint64_t n_before = shim::n_launches;
        g.mover->get(g.rows(some_cells(64, 1)));
        g.mover->settle();
        g.mover->set(g.rows(some_cells(64, 1)));
        ggml_backend_synchronize(&g.device.backend);
        CHECK(shim::n_launches == n_before + 2 && g.device.n_graphs == 0);
        CHECK(g.device.n_uploads == (reaches ? 0 : 2) && g.device.n_downloads == (reaches ? 0 : 1));
        g.mover->get(g.rows(some_cells(300, 1))); // of 64 each
        CHECK(g.hold_originals(some_cells(300, 1), false));
        CHECK(shim::n_launches == n_before + 2 + 5);
    }
}

TEST(no_copier, "where the copier cannot be made a graph moves rows, and it is said why") {
    for (const int fault : { 1, 2, 3, 4 }) { // whose memory, the current device, the kernel, a stream
        delayed_groups g(way::copier);
        shim::fail_in = fault;
        g.make();
        CHECK(shim::fail_in == 0 && g.mover->notes().size() == 1 && g.mover->notes()[0].find("rows on delaying are moved by a graph: ") == 0);
        const auto cells = some_cells(64, 1);
        g.mover->get(g.rows(cells));
        CHECK(g.hold_originals(cells, false) && g.device.n_graphs == 1 && g.mover->staging_bytes() > 0);
    }
    CHECK(shim::n_alive == 0);
}

TEST(failing_copier, "whichever call of CUDA's fails, rows are moved or the move says so, and the next one works") {
    for (const way w : { way::copier, way::copier_unpinned }) {
        for (const bool to_host : { true, false }) {
            int n_refused = 0, fault = 0;
            do {
                delayed_groups g(w);
                g.make();
                const auto cells = some_cells(delayed_groups::N_CELLS, 10);
                g.mover->get(g.rows(cells));
                g.mover->settle();
                const auto before = g.bytes();
                shim::fail_in = ++fault;
                const std::string why = thrown([&] { to_host ? g.mover->get(g.rows(cells)) : g.mover->set(g.rows(cells)); });
                n_refused += !why.empty();
                CHECK(why.empty() || why.find("CUDA failed to ") != std::string::npos);
                if (std::exchange(shim::fail_in, 0) > 0) { // no call is left that could fail
                    break;
                }
                g.mover->get(g.rows(cells));
                CHECK(g.hold_originals(cells, false) && g.bytes() == before);
            } while (true);
            CHECK(n_refused >= 3);
        }
    }
    CHECK(shim::n_alive == 0);
}

TEST(no_events, "a device without events is waited for at once") {
    for (const way w : ALL_WAYS) {
        delayed_groups g(w);
        g.device.has_events = false;
        g.make();
        const auto cells = some_cells(delayed_groups::N_CELLS, 1);
        g.mover->get(g.rows(cells));
        CHECK(g.device.queue.n_waiting() == 0);
        CHECK(g.hold_originals(cells, false));
        g.mover->set(g.rows(cells));
        CHECK(g.device.queue.n_waiting() == 0);
    }
}

TEST(failing_graph, "a device that fails leaves nothing on its way, in any piece") {
    for (const uint32_t fail_in : { 1, 2, 4 }) {
        delayed_groups g;
        g.make();
        const auto cells = some_cells(delayed_groups::N_CELLS, 1);
        const auto before = g.bytes();
        g.device.fail_in = fail_in;
        CHECK(thrown([&] { g.mover->get(g.rows(cells)); }).find("failed to move") != std::string::npos);
        CHECK(g.bytes() == before);
        for (const auto & r : g.rows(cells)) { // these slots are somebody else's from here on
            std::memset(r.host, 0x11, g.mover->token_bytes(r.group));
        }
        ggml_backend_synchronize(&g.device.backend);
        g.mover->settle();
        bool kept = true;
        for (const auto & r : g.rows(cells)) {
            kept = kept && r.host[0] == 0x11 && r.host[g.mover->token_bytes(r.group) - 1] == 0x11;
        }
        CHECK(kept);
        g.mover->get(g.rows(cells));
        CHECK(g.hold_originals(cells, false));
        g.device.fail_in = fail_in;
        CHECK(!thrown([&] { g.mover->set(g.rows(cells)); }).empty());
    }
}

TEST(dropped, "a mover that goes with rows on their way writes to no slot afterwards") {
    for (const way w : ALL_WAYS) {
        delayed_groups g(w);
        g.make();
        g.mover->get(g.rows(some_cells(64, 1)));
        CHECK(g.device.queue.n_waiting() > 0);
    } // its stores are freed without it
    CHECK(shim::n_alive == 0 && shim::n_left == 0);
}

TEST(pageable, "memory that cannot be pinned is noted, and works") {
    for (const bool can_pin : { true, false }) {
        delayed_groups g(can_pin ? way::graph : way::copier_unpinned);
        g.device.can_pin = can_pin;
        g.make();
        CHECK(g.budget.is_pageable == !can_pin);
        const auto cells = some_cells(64, 1);
        g.mover->get(g.rows(cells));
        CHECK(g.hold_originals(cells, false));
    }
}

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
    host_budget budget;
    row_mover mover({ c.tensors }, MOVES_AUTO, budget);
    CHECK(!mover.is_staged(0));
    CHECK(mover.token_bytes(0) == 3*128);
    std::vector<uint8_t> out(mover.token_bytes(0));
    mover.get({ { 0, 9, out.data() } });
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
