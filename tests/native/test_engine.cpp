// The memory under llama_decode, on a two-layer model: random operations against a dense copy of every row.
// Seeds are printed; ASRKF_TEST_SEED runs one, ASRKF_TEST_OPERATIONS how many operations each machine makes.
#include "tiny.h"

#include "scoring/device_scorers.h"
#include "store/host_store.h"
#include "store/row_mover.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <thread>

using asrkf::fail_arena_in;
using asrkf::fail_move_in;
using asrkf::fail_scoring_in;

namespace {

struct options {
    ggml_type type    = GGML_TYPE_F16;
    uint32_t  n_ctx   = 2048;
    uint32_t  n_batch = 512;
    bool      flash   = true;
    uint32_t  n_seq   = 1;
    bool      unified = false;
};

llama_context * make_context(const char * policy, options o = {}) {
    if (policy && !next_policy(policy)) {
        return nullptr;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = o.n_ctx;
    params.n_batch         = o.n_batch;
    params.n_ubatch        = o.n_batch;
    params.n_seq_max       = o.n_seq;
    params.kv_unified      = o.unified;
    params.n_threads       = params.n_threads_batch = 1;
    params.type_k          = params.type_v = o.type;
    params.flash_attn_type = o.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return llama_init_from_model(load_model(), params);
}

struct token_in { llama_token token; llama_pos pos; std::vector<llama_seq_id> seqs; bool output; };

int decode_batch(llama_context * ctx, const std::vector<token_in> & tokens) {
    llama_batch batch = llama_batch_init(int32_t(tokens.size()), 0, 8);
    batch.n_tokens = int32_t(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i]    = tokens[i].token;
        batch.pos[i]      = tokens[i].pos;
        batch.n_seq_id[i] = int32_t(tokens[i].seqs.size());
        std::copy(tokens[i].seqs.begin(), tokens[i].seqs.end(), batch.seq_id[i]);
        batch.logits[i]   = tokens[i].output;
    }
    const int status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return status;
}

std::vector<float> logits_of(llama_context * ctx, int32_t i) {
    const float * logits = llama_get_logits_ith(ctx, i);
    CHECK(logits != nullptr);
    return logits ? std::vector<float>(logits, logits + 256) : std::vector<float>();
}

size_t n_in_state(const std::vector<uint8_t> & states, int wanted) { return size_t(std::count(states.begin(), states.end(), uint8_t(wanted))); }

std::vector<uint8_t> row_at(llama_context * ctx, int32_t seq, uint32_t group, int32_t pos) {
    std::vector<uint8_t> row(group_of(ctx, group).token_bytes);
    CHECK(asrkf_get_rows(ctx, seq, group, pos, row.data(), row.size()) == ASRKF_OK);
    return row;
}

llama_token some_token(uint32_t seq, int32_t pos) { return llama_token((uint32_t(pos)*7919u + seq*104729u) % 251u); }

// n tokens more for each of these sequences, in one batch; outputs for the last of each.
int extend(llama_context * ctx, const std::vector<llama_seq_id> & seqs, int n, uint32_t salt = 0) {
    std::vector<token_in> tokens;
    for (const llama_seq_id seq : seqs) {
        const llama_pos begin = llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
        for (int i = 0; i < n; ++i) {
            tokens.push_back({ some_token(uint32_t(seq) + salt, begin + i), begin + i, { seq }, i + 1 == n });
        }
    }
    return decode_batch(ctx, tokens);
}

// What must hold after every call: contract 5 for every sequence, the bound, and every row as it was when it was computed.
// The oracle: a dense copy of all rows, by sequence and position.
class witness {
public:
    using row = std::shared_ptr<std::vector<std::vector<uint8_t>>>; // by layer group; sequences may share it
    using dense = std::map<llama_pos, row>;

    explicit witness(llama_context * ctx, int n_seq = 1) : copies(size_t(n_seq)), ctx(ctx), device_bytes(stats_of(ctx).device_kv_bytes) {}

    std::vector<dense> copies; // what should be there

    // Positions that a decode should have added, and may have (it failed halfway), are learnt here; all others must be there.
    void check(std::mt19937 & random, int n_samples = 6) {
        const asrkf_stats s = stats_of(ctx);
        CHECK(s.device_kv_bytes == device_bytes && s.host_kv_peak_bytes >= s.host_kv_bytes);
        if (s.rewalks_total != n_rewalks) { // the end of a prompt was computed again
            for (dense & copy : copies) {
                copy.erase(copy.lower_bound(copy.empty() ? 0 : copy.rbegin()->first + 1 - REWALK_TOKENS), copy.end());
            }
        }
        n_rewalks = s.rewalks_total;
        size_t n_tokens = 0, n_live = 0;
        for (size_t seq = 0; seq < copies.size(); ++seq) {
            dense & copy = copies[seq];
            std::vector<int32_t> pos(states_of(ctx, int(seq)).size());
            size_t n = 0;
            CHECK(asrkf_get_tokens(ctx, int(seq), 0, pos.data(), nullptr, pos.size(), &n) == ASRKF_OK && n == pos.size());
            n_tokens += n;
            n_live   += n > 0;
            CHECK(std::is_sorted(pos.begin(), pos.end()) && std::adjacent_find(pos.begin(), pos.end()) == pos.end());
            CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx), int(seq)) == (n ? pos.back() : -1) && llama_memory_seq_pos_min(llama_get_memory(ctx), int(seq)) == (n ? pos.front() : -1));
            for (const int32_t p : pos) {
                if (!copy.count(p)) {
                    CHECK(copy.empty() || p > copy.rbegin()->first); // new ones come at the end
                    copy[p] = read(int(seq), p);
                }
            }
            CHECK(copy.size() == n); // none is missing
            for (int i = 0; i < n_samples && n > 0; ++i) {
                const int32_t p = pos[random() % n];
                if (*read(int(seq), p) != *copy[p]) {
                    std::printf("sequence %zu: the row of position %d changed\n", seq, p);
                    CHECK(false);
                }
            }
        }
        CHECK(s.tokens <= n_tokens && s.n_sequences == n_live);
        for (uint32_t ig = 0; ig < s.n_groups; ++ig) {
            const asrkf_group_stats g = group_of(ctx, ig);
            CHECK(g.active_cells + g.frozen_cells == s.tokens && g.active_cells <= g.pool_cells);
            size_t n_active = 0;
            for (size_t seq = 0; seq < copies.size(); ++seq) {
                const auto states = states_of(ctx, int(seq), ig);
                CHECK(states.size() == copies[seq].size());
                n_active += states.size() - n_in_state(states, ASRKF_TOKEN_FROZEN);
            }
            CHECK(n_active >= g.active_cells && (n_tokens > s.tokens || n_active == g.active_cells)); // shared cells count once
        }
    }

    static constexpr int32_t REWALK_TOKENS = 48; // the default

    void check_all_rows() {
        bool same = true;
        for (size_t seq = 0; seq < copies.size(); ++seq) {
            for (const auto & [p, row] : copies[seq]) {
                same = same && *read(int(seq), p) == *row;
            }
        }
        CHECK(same);
    }

    row read(int seq, int32_t pos) const {
        auto rows = std::make_shared<std::vector<std::vector<uint8_t>>>();
        for (uint32_t ig = 0; ig < stats_of(ctx).n_groups; ++ig) {
            rows->push_back(row_at(ctx, seq, ig, pos));
        }
        return rows;
    }

private:
    llama_context * ctx;
    uint64_t        device_bytes;
    uint64_t        n_rewalks = 0;
};

bool abort_now(void * data) { return *static_cast<bool *>(data); }

// Random operations, some of them made to fail: by the host limit, an abort, an arena that cannot be allocated, a copy that
// stops halfway.
void machine(const char * policy, options o, uint32_t seed, int n_operations) {
    std::mt19937 random(seed);
    const auto below = [&](int32_t n) { return int32_t(random() % uint32_t(std::max(1, n))); };
    llama_context * ctx = make_context(policy, o);
    CHECK(ctx != nullptr);
    if (!ctx) {
        std::printf("%s: %s\n", policy, asrkf_last_error());
        return;
    }
    bool aborting = false;
    llama_set_abort_callback(ctx, abort_now, &aborting);
    llama_memory_t mem = llama_get_memory(ctx);
    const int n_seq = int(o.n_seq);
    const int32_t n_ctx_seq = int32_t(o.n_ctx) / (o.unified ? 1 : n_seq);
    witness watch(ctx, n_seq);
    struct saving { std::vector<uint8_t> blob; int seq; std::vector<witness::dense> copies; };
    std::vector<saving> savings;
    uint64_t n_frozen_seen = 0;
    for (int i = 0; i < n_operations; ++i) {
        const int seq = below(n_seq);
        witness::dense & copy = watch.copies[size_t(seq)];
        const int32_t end = copy.empty() ? 0 : copy.rbegin()->first + 1;
        const uint32_t what = random() % 1000, failing = random() % 100;
        fail_move_in  = failing == 0 ? 1 + uint32_t(below(3)) : 0;
        fail_arena_in = failing == 1 ? 1 : 0;
        if (what < 700) {
            const auto end_of = [&](int q) { return watch.copies[size_t(q)].empty() ? 0 : watch.copies[size_t(q)].rbegin()->first + 1; };
            const int32_t n = what < 600 ? 1 : 1 + below(int32_t(o.n_batch)/n_seq);
            const int next = (seq + 1) % n_seq;
            const bool coupled = o.unified && n_seq > 1 && end == end_of(next) && what % 4 == 0; // at the same position: the same tokens
            std::vector<std::vector<llama_seq_id>> parts = { coupled ? std::vector<llama_seq_id>{ seq, next } : std::vector<llama_seq_id>{ seq } };
            for (int q = 0; q < n_seq && !coupled; ++q) {
                if (q != seq && random() % 2) {
                    parts.push_back({ q });
                }
            }
            std::vector<token_in> tokens;
            int32_t most = 0, sum = 0;
            for (const auto & seqs : parts) {
                const int32_t begin = end_of(seqs[0]);
                for (int32_t t = 0; t < n; ++t) {
                    tokens.push_back({ some_token(random(), t), begin + t, seqs, t + 1 == n });
                }
                most = std::max(most, begin + n);
            }
            for (const auto & c : watch.copies) {
                sum += int32_t(c.size());
            }
            if (most > n_ctx_seq || sum + int32_t(tokens.size()) > int32_t(o.n_ctx)) { // room for what comes
                llama_memory_seq_rm(mem, seq, end/2, -1);
                copy.erase(copy.lower_bound(end/2), copy.end());
                for (int q = 0; q < n_seq && most > n_ctx_seq; ++q) {
                    auto & other = watch.copies[size_t(q)];
                    llama_memory_seq_rm(mem, q, n_ctx_seq/2, -1);
                    other.erase(other.lower_bound(n_ctx_seq/2), other.end());
                }
            } else {
                aborting = failing == 2;
                const std::vector<witness::dense> before = watch.copies;
                const int status = decode_batch(ctx, tokens);
                aborting = false;
                for (int q = 0; q < n_seq; ++q) { // what must be there after a success, and may be after a failure
                    const int32_t had = before[size_t(q)].empty() ? -1 : before[size_t(q)].rbegin()->first, now = llama_memory_seq_pos_max(mem, q);
                    const int32_t added = int32_t(std::count_if(tokens.begin(), tokens.end(), [&](const token_in & t) { return std::count(t.seqs.begin(), t.seqs.end(), q) > 0; }));
                    CHECK(status == 0 ? now == had + added : now >= had && now <= had + added);
                }
                CHECK(status == 0 || std::strlen(asrkf_last_error()) > 0 || failing == 2);
            }
        } else if (what < 760 && end > 0) {
            const int32_t p0 = below(end), p1 = p0 + 1 + below(40);
            uint64_t moved = 0;
            const asrkf_status status = asrkf_freeze(ctx, seq, p0, p1, &moved);
            CHECK(status == ASRKF_OK || status == ASRKF_PROTECTED || status == ASRKF_HOST_LIMIT || failing < 2);
            CHECK(status == ASRKF_OK || moved == 0);
        } else if (what < 820 && end > 0) {
            const int32_t p0 = below(end), p1 = p0 + 1 + below(80);
            const asrkf_status status = asrkf_restore(ctx, seq, p0, p1, nullptr);
            CHECK(status == ASRKF_OK || status == ASRKF_POOL_FULL || failing < 2);
        } else if (what < 850 && end > 0) {
            const int32_t p0 = below(end);
            asrkf_pin(ctx, seq, p0, p0 + below(8)); // may be refused: then the pool is too small for it
        } else if (what < 880) {
            CHECK(asrkf_unpin(ctx, seq, 0, -1) == ASRKF_OK);
        } else if (what < 915 && end > 0) { // roll-back
            const int32_t p0 = end - 1 - below(std::min(end, 200));
            CHECK(llama_memory_seq_rm(mem, seq, p0, -1));
            copy.erase(copy.lower_bound(p0), copy.end());
        } else if (what < 925) {
            CHECK(llama_memory_seq_rm(mem, -1, n_ctx_seq, -1)); // llama-cpp-python does this before every token
        } else if (what < 940 && end > 20) { // a hole; or context shift
            const int32_t p0 = below(end - 10), p1 = p0 + 1 + below(std::min(end - p0 - 1, 60));
            CHECK(llama_memory_seq_rm(mem, seq, p0, p1));
            copy.erase(copy.lower_bound(p0), copy.lower_bound(p1));
            if (what % 2) {
                llama_memory_seq_add(mem, seq, p1, -1, p0 - p1);
                witness::dense shifted(copy.begin(), copy.lower_bound(p1));
                const bool done = std::strstr(asrkf_last_error(), "could not be shifted") == nullptr;
                for (auto it = copy.lower_bound(p1); done && it != copy.end(); ++it) {
                    const int32_t p = it->first + p0 - p1;
                    shifted[p] = watch.read(seq, p);
                    const auto & before = (*it->second)[0], & after = (*shifted[p])[0];
                    CHECK(before.size() == after.size() && before != after); // K turned; V, in the second half of a layer's part, did not
                    const size_t n_layer = 2 / stats_of(ctx).n_groups, part = before.size()/n_layer/2;
                    for (size_t l = 0; l < n_layer; ++l) {
                        CHECK(std::equal(before.begin() + std::ptrdiff_t((2*l + 1)*part), before.begin() + std::ptrdiff_t((2*l + 2)*part), after.begin() + std::ptrdiff_t((2*l + 1)*part)));
                    }
                }
                if (done) {
                    copy = shifted;
                }
            }
        } else if (what < 955 && n_seq > 1) {
            const int dst = (seq + 1 + below(n_seq - 1)) % n_seq;
            auto & to = watch.copies[size_t(dst)];
            if (o.unified) { // onto nothing: two rows at one position are legal, and no use
                llama_memory_seq_rm(mem, dst, -1, -1);
                to.clear();
                const int32_t p1 = what % 2 ? -1 : below(end + 1);
                llama_memory_seq_cp(mem, seq, dst, 0, p1);
                to = p1 < 0 ? copy : witness::dense(copy.begin(), copy.lower_bound(p1));
            } else {
                llama_memory_seq_cp(mem, seq, dst, -1, -1);
                to = copy;
            }
        } else if (what < 957 && n_seq > 1) {
            llama_memory_seq_keep(mem, seq);
            for (int q = 0; q < n_seq; ++q) {
                if (q != seq) {
                    watch.copies[size_t(q)].clear();
                }
            }
        } else if (what < 970) { // a state, of one sequence or of all
            const int which = what % 2 ? -1 : seq;
            savings.resize(std::min<size_t>(savings.size(), 2));
            saving now = { {}, which, watch.copies };
            now.blob.resize(which < 0 ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, which));
            CHECK(!now.blob.empty());
            CHECK((which < 0 ? llama_state_get_data(ctx, now.blob.data(), now.blob.size()) : llama_state_seq_get_data(ctx, now.blob.data(), now.blob.size(), which)) == now.blob.size());
            savings.insert(savings.begin(), std::move(now));
        } else if (what < 985 && !savings.empty()) {
            const saving & old = savings[size_t(below(int32_t(savings.size())))];
            const int dst = old.seq < 0 ? -1 : seq;
            const size_t n_read = dst < 0 ? llama_state_set_data(ctx, old.blob.data(), old.blob.size()) : llama_state_seq_set_data(ctx, old.blob.data(), old.blob.size(), dst);
            CHECK(n_read == old.blob.size() || n_read == 0);
            if (n_read == 0) {
                CHECK(asrkf_last_status() == ASRKF_HOST_LIMIT || asrkf_last_status() == ASRKF_POOL_FULL || failing < 2);
            } else if (dst < 0) {
                watch.copies = old.copies;
            } else {
                watch.copies[size_t(dst)] = old.copies[size_t(old.seq)];
            }
        } else if (what == 999) {
            llama_memory_clear(mem, random() % 2);
            for (auto & c : watch.copies) {
                c.clear();
            }
        }
        fail_move_in = fail_arena_in = 0;
        if (std::strstr(asrkf_last_error(), "could not be")) { // a copy or a shift failed, which cannot say so: the sequence's decodes do, until it is empty
            const std::string text = asrkf_last_error();
            int n_refused = 0;
            for (int q = 0; q < n_seq; ++q) {
                const int status = decode_batch(ctx, { { 1, llama_memory_seq_pos_max(mem, q) + 1, { q }, true } });
                n_refused += status != 0 && text == asrkf_last_error();
                llama_memory_seq_rm(mem, q, -1, -1);
                watch.copies[size_t(q)].clear();
            }
            CHECK(n_refused == 1);
        }
        asrkf_clear_error();
        n_frozen_seen += stats_of(ctx).frozen_cells;
        const int before = n_failed_checks;
        watch.check(random);
        if (n_failed_checks != before) {
            std::printf("machine \"%s\", %d sequences%s, seed %u, operation %d (%u, failing %u)\n", policy, n_seq, o.unified ? " in one pool" : "", seed, i, what, failing);
            break;
        }
    }
    watch.check_all_rows();
    CHECK(n_frozen_seen > 0 || n_operations < 100);
    llama_free(ctx);
}

} // namespace

// What kvzip needs, of the tiny model.
static std::string gates_for(const std::string & policy) {
    const char * file = std::getenv("ASRKF_TEST_GATES");
    return policy.compare(0, 5, "kvzip") == 0 ? std::string(",gates=") + (file ? file : "ASRKF_TEST_GATES is not set") : "";
}

TEST(random_machine, "random operations, some made to fail, never lose or change a row of any sequence") {
    const char * one   = std::getenv("ASRKF_TEST_SEED");
    const char * count = std::getenv("ASRKF_TEST_OPERATIONS");
    const int n = count ? std::atoi(count) : 300;
    const uint32_t first = one ? uint32_t(std::atol(one)) : 1;
    std::printf("     seeds %u, %u; %d operations each\n", first, first + 1, n);
    for (uint32_t seed = first; seed < first + (one ? 1u : 2u); ++seed) {
        for (const char * moves : { "direct", "staged" }) {
            const auto run = [&](const char * policy, options o) { machine((policy + gates_for(policy) + ",moves=" + moves).c_str(), o, seed, n); };
            for (const char * policy : { "asrkf,pool=512", "asrkf,layers=0@512/1@768", "flag-all,pool=512", "paper,pool=512,tau=0.5", "random,pool=512,window=64",
                    "asrkf,pool=512,recall=mean_key", "window,pool=512", "asrkf,pool=512,host_limit=300kB", "asrkf,layers=0@512/1@768,recovery=second_look,look_share=0.5,look_trigger=random",
                    "refreekv,pool=512,tolerance=0.3,repeat=40,rows=3", "kvzip,layers=0@512/1@768,window=64", "asrkf,layers=0@512/1@768,ranking=own" }) {
                run(policy, {});
            }
            options several;
            several.n_seq = 3;
            several.n_ctx = 3072;
            several.unified = true;
            for (const char * policy : { "asrkf,pool=768", "asrkf,layers=0@768/1@1024", "paper,pool=768,tau=0.5", "asrkf,pool=768,recall=mean_key", "asrkf,pool=768,host_limit=600kB",
                    "kvzip,pool=768,window=64", "asrkf,layers=0@768/1@1024,ranking=own",
                    "asrkf,pool=768,host_limit=600kB,recovery=second_look,look_share=0.5,look_trigger=random",
                    "refreekv,pool=768,tolerance=0.3,host_limit=900kB", "refreekv,pool=768,tolerance=0.3,recall=exact,order=relevance" }) {
                run(policy, several);
            }
            several.unified = false;
            for (const char * policy : { "asrkf,pool=768", "asrkf,layers=0@768/1@1536,host_limit=2MB,ranking=own", "refreekv,pool=768,tolerance=0.3" }) {
                run(policy, several);
            }
        }
        options q8;
        q8.type = GGML_TYPE_Q8_0;
        machine("asrkf,pool=512,moves=staged", q8, seed, n);
        options q4;
        q4.type = GGML_TYPE_Q4_0;
        machine("asrkf,layers=0@768/1@512,moves=staged", q4, seed, n);
    }
}

TEST(long_prompt, "a prompt of four pools in one batch is read, and seven eighths of the context is reachable") {
    options o;
    o.n_ctx = 4096;
    o.n_batch = 4096;
    llama_context * ctx = make_context("asrkf,pool=512", o);
    CHECK(ctx && decode(ctx, std::vector<llama_token>(3584, 7)) == 0);
    const asrkf_stats s = stats_of(ctx);
    CHECK(s.tokens == 3584 && s.active_cells <= 512 && s.frozen_cells == 3584 - s.active_cells);
    CHECK(s.host_kv_bytes >= uint64_t(s.frozen_cells)*group_of(ctx, 0).token_bytes);
    CHECK(s.device_staging_bytes == 0); // host memory: no staging, no second copy
    llama_free(ctx);
}

TEST(sealed_copies, "with staged moves a sealed block has its host copy before it is frozen") {
    llama_context * ctx = make_context("asrkf,pool=512,moves=staged");
    CHECK(ctx && decode(ctx, std::vector<llama_token>(480, 7)) == 0 && decode(ctx, { 1 }) == 0);
    const asrkf_group_stats g = group_of(ctx, 0);
    CHECK(g.frozen_cells == 0);
    CHECK(g.active_copied_cells == (481 - 256)/32*32); // whole blocks before the window of 256
    const uint64_t moved = stats_of(ctx).moved_to_host_bytes;
    CHECK(asrkf_freeze(ctx, 0, 64, 96, nullptr) == ASRKF_OK);
    CHECK(stats_of(ctx).moved_to_host_bytes == moved); // nothing to copy
    CHECK(asrkf_restore(ctx, 0, 64, 96, nullptr) == ASRKF_OK);
    CHECK(group_of(ctx, 0).active_copied_cells == g.active_copied_cells); // the copy stays valid
    CHECK(stats_of(ctx).device_staging_bytes > 0);
    llama_free(ctx);
}

TEST(copies_make_way, "near the host limit the copies of active tokens make way for frozen ones") {
    llama_context * ctx = make_context("asrkf,pool=512,moves=staged,host_limit=1550000B");
    CHECK(group_of(ctx, 0).token_bytes == 1024); // 1513 slots: enough for 1408 frozen tokens, not for 1664 sealed ones
    for (int i = 0; i < 15; ++i) {
        CHECK(decode(ctx, std::vector<llama_token>(128, i)) == 0);
    }
    const asrkf_stats s = stats_of(ctx);
    CHECK(s.tokens == 1920 && s.frozen_cells >= 1408 && s.host_kv_peak_bytes <= 1550000);
    CHECK(group_of(ctx, 0).active_copied_cells + s.frozen_cells <= 1513);
    std::mt19937 random(1);
    witness(ctx).check(random);
    llama_free(ctx);
}

static std::vector<uint8_t> saved(llama_context * ctx) {
    std::vector<uint8_t> blob(llama_state_get_size(ctx));
    CHECK(!blob.empty() && llama_state_get_data(ctx, blob.data(), blob.size()) == blob.size());
    return blob;
}

static std::vector<std::vector<uint8_t>> rows_of(llama_context * ctx, uint32_t group) {
    std::vector<std::vector<uint8_t>> rows;
    for (uint64_t pos = 0; pos < stats_of(ctx).tokens; ++pos) {
        rows.emplace_back(group_of(ctx, group).token_bytes);
        CHECK(asrkf_get_rows(ctx, 0, group, int32_t(pos), rows.back().data(), rows.back().size()) == ASRKF_OK);
    }
    return rows;
}

struct rewalk_watch {
    llama_context * ctx;
    uint64_t        before;
};

static bool abort_in_rewalk(void * data) {
    const auto * watch = static_cast<const rewalk_watch *>(data);
    return watch->ctx && stats_of(watch->ctx).rewalks_total > watch->before;
}

TEST(rewalk, "the end of a long prompt is computed again in its cells; given up halfway, only the call's own tokens go") {
    llama_context * plain = make_context("asrkf,pool=512,rewalk_tokens=0");
    llama_context * ctx   = make_context("asrkf,pool=512");
    std::mt19937 random(5);
    const auto tokens = [&](int n) {
        std::vector<llama_token> result;
        for (int i = 0; i < n; ++i) {
            result.push_back(llama_token(random() % 256));
        }
        return result;
    };
    CHECK(asrkf_prompt_follows(ctx, 1) == ASRKF_OK);
    for (int i = 0; i < 4; ++i) {
        const auto part = tokens(300);
        if (i == 3) {
            CHECK(stats_of(ctx).rewalks_total == 0); // more was to come
            CHECK(asrkf_prompt_follows(ctx, 0) == ASRKF_OK);
        }
        CHECK(decode(plain, part) == 0 && decode(ctx, part) == 0);
    }
    const asrkf_stats s = stats_of(ctx);
    CHECK(s.tokens == 1200 && s.rewalks_total == 1 && s.rewalked_tokens_total == 48 && stats_of(plain).rewalks_total == 0);
    const auto a = rows_of(plain, 0), b = rows_of(ctx, 0);
    CHECK(std::equal(a.begin(), a.begin() + 1152, b.begin())); // before its end the prompt is what it was
    int n_changed = 0;
    for (size_t i = 1152; i < 1200; ++i) {
        n_changed += a[i] != b[i];
    }
    CHECK(n_changed > 24); // other tokens were there to attend to
    CHECK(decode(ctx, { 1 }) == 0 && stats_of(ctx).rewalks_total == 1); // a generated token is no prompt

    rewalk_watch watch = { ctx, 1 };
    llama_set_abort_callback(ctx, abort_in_rewalk, &watch);
    CHECK(decode(ctx, tokens(10)) == 2); // 38 of the 48 tokens are of earlier calls
    CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx), 0) == 1200);
    watch.ctx = nullptr;
    CHECK(decode(ctx, tokens(10)) == 0 && stats_of(ctx).tokens == 1211);
    witness(ctx).check(random);
    llama_free(ctx);
    llama_free(plain);
}

TEST(rewalk_with_holes, "where positions have holes, the end of a prompt is what lies in the window") {
    llama_context * ctx = make_context("asrkf,pool=512,window=128");
    for (int i = 0; i < 8; ++i) {
        CHECK(decode(ctx, std::vector<llama_token>(200, i)) == 0);
    }
    const uint64_t before = stats_of(ctx).rewalks_total;
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx), 0, 1500, -1) && llama_memory_seq_rm(llama_get_memory(ctx), 0, 1000, 1490));
    CHECK(decode(ctx, std::vector<llama_token>(20, 9)) == 0);
    const asrkf_stats s = stats_of(ctx);
    CHECK(s.tokens == 1030 && s.rewalks_total == before + 1 && s.rewalked_tokens_total == before*48 + 30);
    std::vector<int32_t> pos(s.tokens);
    std::vector<uint8_t> state(s.tokens);
    size_t n = 0;
    CHECK(asrkf_get_tokens(ctx, 0, 0, pos.data(), state.data(), pos.size(), &n) == ASRKF_OK && n == 1030);
    CHECK(uint32_t(std::count(state.begin(), state.end(), uint8_t(ASRKF_TOKEN_FROZEN))) == group_of(ctx, 0).frozen_cells);
    std::vector<uint8_t> row(group_of(ctx, 0).token_bytes);
    for (const int32_t p : pos) {
        CHECK(asrkf_get_rows(ctx, 0, 0, p, row.data(), row.size()) == ASRKF_OK); // no token is nowhere
    }
    llama_free(ctx);
}

TEST(open_ended_pins, "an open end is what is there to pin, and everything to unpin") {
    llama_context * ctx = make_context("asrkf,pool=512");
    CHECK(decode(ctx, std::vector<llama_token>(50, 3)) == 0);
    CHECK(asrkf_pin(ctx, 0, 0, 150) == ASRKF_OK); // positions to come, too
    CHECK(asrkf_pin(ctx, 0, 100, -1) == ASRKF_OK);
    CHECK(asrkf_pin(ctx, 0, 0, 400) == ASRKF_POOL_FULL && asrkf_last_status() == ASRKF_POOL_FULL);
    CHECK(asrkf_unpin(ctx, 0, 0, -1) == ASRKF_OK);
    for (int i = 0; i < 8; ++i) {
        CHECK(decode(ctx, std::vector<llama_token>(100, i)) == 0);
    }
    CHECK(asrkf_freeze(ctx, 0, 120, 140, nullptr) == ASRKF_OK); // nothing is pinned any more
    llama_free(ctx);
}

TEST(refusals, "a context that cannot be served is refused with the reason") {
    const auto refused = [](const char * policy, options o, const char * part) {
        llama_context * ctx = make_context(policy, o);
        CHECK(ctx == nullptr);
        if (ctx) {
            std::printf("\"%s\" was accepted\n", policy);
            llama_free(ctx);
        }
        const bool found = std::strstr(asrkf_last_error(), part) != nullptr;
        if (!found) {
            std::printf("expected \"%s\" in \"%s\"\n", part, asrkf_last_error());
        }
        CHECK(found);
    };
    refused("asrkf,device_limit=1MiB", {}, "the smallest pool, 256 of 2048 cells in f16, does not fit");
    refused("asrkf,pool=4096", {}, "larger than n_ctx 2048");
    refused("asrkf,pool=256,window=200", {}, "raise kv_pool to at least 512 or lower window");
    refused("asrkf,pool=512,pinned=0-400", {}, "raise kv_pool to at least 768");
    refused("asrkf,layers=0@512", {}, "layer 1 is in no group");
    refused("asrkf,layers=0-1@512/1@512", {}, "layer 1 is in two groups");
    refused("asrkf,layers=0-2@512", {}, "layer 2 has no KV cache");
    refused("asrkf,pool=512,score_layers=9", {}, "the model has 2 layers");
    options no_flash;
    no_flash.flash = false;
    refused("asrkf,pool=512", no_flash, "pass flash_attn=True");
    options many;
    many.n_seq = 4;
    refused("asrkf,pool=512", many, "less than 256 for each of 4 sequences: raise kv_pool to at least 1024");
    many.unified = true;
    refused("asrkf,pool=512", many, "of which each of 4 sequences must get 128, cannot hold");
    refused("asrkf,pool=512", many, "raise kv_pool to at least 1024 or lower the number of sequences (-np)");
    options q8_1;
    q8_1.type = GGML_TYPE_Q8_1;
    refused("asrkf,pool=512", q8_1, "q8_1 is not a type for a K cache");
}

TEST(consumed_once, "settings serve one context, also a refused one; the next runs upstream's cache") {
    llama_context * refused = make_context("asrkf,pool=100000");
    CHECK(refused == nullptr);
    llama_context * plain = make_context(nullptr);
    CHECK(plain != nullptr && stats_of(plain).policy == ASRKF_POLICY_FULL);
    CHECK(asrkf_freeze(plain, 0, 0, 1, nullptr) == ASRKF_NO_POLICY);
    llama_free(plain);
}

TEST(state, "with state=upstream, what is saved here loads there and the other way round") {
    llama_context * ctx = make_context("asrkf,pool=512,state=upstream");
    CHECK(decode(ctx, std::vector<llama_token>(100, 3)) == 0);
    const auto blob = saved(ctx);
    const auto logits = [&](llama_context * c) { return std::vector<float>(llama_get_logits(c), llama_get_logits(c) + 256); };
    CHECK(decode(ctx, { 9 }) == 0);
    const auto expected = logits(ctx);
    llama_context * plain = make_context(nullptr);
    CHECK(llama_state_set_data(plain, blob.data(), blob.size()) == blob.size());
    CHECK(saved(plain) == blob);
    CHECK(decode(plain, { 9 }) == 0 && logits(plain) == expected);
    // back into a pool that has frozen something
    CHECK(decode(ctx, std::vector<llama_token>(300, 5)) == 0 && decode(ctx, std::vector<llama_token>(300, 6)) == 0);
    CHECK(stats_of(ctx).frozen_cells > 0);
    CHECK(llama_state_set_data(ctx, blob.data(), blob.size()) == blob.size());
    CHECK(stats_of(ctx).tokens == 100);
    CHECK(decode(ctx, { 9 }) == 0 && logits(ctx) == expected);
    CHECK(stats_of(ctx).frozen_cells == 0);
    std::mt19937 random(1);
    witness(ctx).check(random);
    llama_free(plain);
    llama_free(ctx);
}

TEST(frozen_state, "a state holds frozen tokens too, and loads into any pool, any groups, and the full cache") {
    llama_context * ctx = make_context("asrkf,pool=512,moves=staged,rewalk_tokens=0");
    for (int i = 0; i < 10; ++i) {
        CHECK(decode(ctx, std::vector<llama_token>(100, i)) == 0);
    }
    CHECK(stats_of(ctx).frozen_cells >= 488);
    const auto blob = saved(ctx);
    const auto rows = rows_of(ctx, 0);
    CHECK(llama_state_seq_get_size(ctx, 0) > 0);

    for (const char * policy : { "asrkf,pool=768", "window,pool=512,moves=staged", "asrkf,pool=512,host_limit=1100000B" }) {
        llama_context * other = make_context(policy);
        CHECK(decode(other, std::vector<llama_token>(250, 1)) == 0 && decode(other, std::vector<llama_token>(250, 2)) == 0); // what was there goes
        CHECK(llama_state_set_data(other, blob.data(), blob.size()) == blob.size());
        CHECK(rows_of(other, 0) == rows);
        CHECK(decode(other, { 9 }) == 0);
        const asrkf_stats s = stats_of(other);
        CHECK(s.tokens == 1001 && s.active_cells > s.pool_cells - 16 && s.active_cells <= s.pool_cells);
        std::mt19937 random(1);
        witness(other).check(random);
        llama_free(other);
    }
    llama_context * groups = make_context("asrkf,layers=0@512/1@768");
    CHECK(llama_state_set_data(groups, blob.data(), blob.size()) == blob.size()); // before its first decode
    CHECK(decode(groups, { 9 }) == 0 && stats_of(groups).tokens == 1001);
    CHECK(llama_memory_seq_rm(llama_get_memory(groups), 0, 1000, -1));
    CHECK(rows_of(groups, 0)[0].size() == rows[0].size()/2);
    llama_free(groups);
    llama_context * plain = make_context(nullptr);
    CHECK(llama_state_set_data(plain, blob.data(), blob.size()) == 0); // never taken for its own
    llama_context * whole = make_context("asrkf,pool=512,state=upstream");
    CHECK(llama_state_set_data(whole, blob.data(), blob.size()) == blob.size());
    const auto handed = saved(whole);
    CHECK(llama_state_set_data(plain, handed.data(), handed.size()) == handed.size());
    CHECK(decode(plain, { 9 }) == 0);
    llama_free(whole);
    llama_free(plain);

    options small;
    small.n_ctx = 768;
    llama_context * too_small = make_context("asrkf,pool=512", small);
    CHECK(llama_state_set_data(too_small, blob.data(), blob.size()) == 0);
    CHECK(std::strstr(asrkf_last_error(), "raise n_ctx") != nullptr);
    llama_free(too_small);
    llama_context * limited = make_context("asrkf,pool=512,host_limit=300kB");
    CHECK(decode(limited, { 1, 2, 3 }) == 0);
    CHECK(llama_state_set_data(limited, blob.data(), blob.size()) == 0 && asrkf_last_status() == ASRKF_HOST_LIMIT);
    CHECK(stats_of(limited).tokens == 3); // as it was
    llama_free(limited);
    options q8;
    q8.type = GGML_TYPE_Q8_0;
    llama_context * other_type = make_context("asrkf,pool=512", q8);
    CHECK(llama_state_set_data(other_type, blob.data(), blob.size()) == 0);
    CHECK(std::strstr(asrkf_last_error(), "cache type") != nullptr);
    llama_free(other_type);
    llama_free(ctx);
}

TEST(damaged_state, "a truncated or damaged state is refused and the sequence stays, or is read where only rows differ; it never crashes") {
    llama_context * ctx = make_context("asrkf,pool=512");
    CHECK(decode(ctx, std::vector<llama_token>(250, 3)) == 0 && decode(ctx, std::vector<llama_token>(250, 4)) == 0 && decode(ctx, std::vector<llama_token>(200, 5)) == 0);
    const auto blob = saved(ctx);
    const size_t n_own = blob.size() - stats_of(ctx).tokens*(group_of(ctx, 0).token_bytes + 12);
    CHECK(decode(ctx, { 5 }) == 0);
    const auto rows = rows_of(ctx, 0);
    std::mt19937 random(20251211);
    for (int i = 0; i < 60; ++i) {
        const size_t size = random() % blob.size();
        CHECK(llama_state_set_data(ctx, blob.data(), size) == 0);
        CHECK(stats_of(ctx).tokens == 701);
    }
    CHECK(rows_of(ctx, 0) == rows);
    int n_refused = 0;
    for (int i = 0; i < 400; ++i) {
        auto damaged = blob;
        // what is ours, and then counts, positions, the first types and sizes
        damaged[random() % std::min(damaged.size(), n_own + 9000)] ^= uint8_t(1 + random() % 255);
        const uint64_t before = stats_of(ctx).tokens;
        if (llama_state_set_data(ctx, damaged.data(), damaged.size()) == 0) {
            CHECK(stats_of(ctx).tokens == before);
            n_refused++;
        }
        CHECK(decode(ctx, { 7 }) == 0 || std::strlen(asrkf_last_error()) > 0);
        if (llama_memory_seq_pos_max(llama_get_memory(ctx), 0) > 1500) {
            llama_memory_clear(llama_get_memory(ctx), true);
        }
    }
    CHECK(n_refused > 20);
    llama_free(ctx);
}

//
// several sequences, shifts
//

namespace {

// seq_div as llama.h has it. Upstream's own, at this pin, turns the rows the wrong way (llama_kv_cells::pos_div adds what it
// should take off), so there it is made of shifts.
void divide(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, int d) {
    llama_memory_t mem = llama_get_memory(ctx);
    if (stats_of(ctx).policy != ASRKF_POLICY_FULL) {
        llama_memory_seq_div(mem, seq, p0, p1, d);
        return;
    }
    for (llama_pos p = p0; p < p1; ++p) {
        llama_memory_seq_add(mem, seq, p, p + 1, p/d - p);
    }
}

} // namespace

TEST(several_held, "several sequences in a pool that holds all give upstream's logits, shared prefixes, copies and shifts included") {
    for (const bool unified : { true, false }) {
        options o;
        o.n_seq   = 4;
        o.unified = unified;
        llama_context * ours  = make_context("asrkf,pool=2048", o);
        llama_context * plain = make_context(nullptr, o);
        CHECK(ours && plain);
        const auto both = [&](auto what) { what(ours); what(plain); };
        int n_steps = 0;
        const auto same = [&](int32_t n) {
            n_steps++;
            for (int32_t i = 0; i < n; ++i) { // the i-th output from the end
                const bool equal = logits_of(ours, -1 - i) == logits_of(plain, -1 - i);
                CHECK(equal);
                if (!equal) {
                    std::printf("unified %d, step %d, output %d from the end\n", unified, n_steps, i);
                }
            }
        };
        both([](llama_context * c) { CHECK(extend(c, { 0 }, 100) == 0); });
        same(1);
        both([](llama_context * c) { llama_memory_seq_cp(llama_get_memory(c), 0, 1, -1, -1); CHECK(extend(c, { 0, 1, 2 }, 30) == 0); });
        same(3);
        if (unified) { // a prefix that is decoded once for two; part of a sequence for another
            both([](llama_context * c) {
                std::vector<token_in> tokens;
                for (int32_t p = 130; p < 150; ++p) {
                    tokens.push_back({ some_token(9, p), p, { 0, 1 }, p == 149 });
                }
                CHECK(decode_batch(c, tokens) == 0);
                llama_memory_seq_cp(llama_get_memory(c), 0, 3, 0, 120);
                CHECK(extend(c, { 3, 1 }, 5) == 0);
            });
            same(2);
        }
        both([](llama_context * c) { // context shift, and self-extend, of one; the others are as they were
            llama_memory_t mem = llama_get_memory(c);
            llama_memory_seq_rm(mem, 2, 4, 14);
            llama_memory_seq_add(mem, 2, 14, -1, -10);
            CHECK(extend(c, { 0, 1, 2 }, 3) == 0);
        });
        same(3);
        both([&](llama_context * c) {
            llama_memory_t mem = llama_get_memory(c);
            llama_memory_seq_rm(mem, 2, 1, 10);
            divide(c, 2, 10, 20, 2); // onto those
            llama_memory_seq_keep(mem, 2);
            CHECK((!unified || llama_memory_seq_pos_max(mem, 0) == -1) && llama_memory_seq_pos_min(mem, 2) == 0); // upstream: of its stream only
            CHECK(extend(c, { 2 }, 4) == 0);
        });
        same(1);
        CHECK(stats_of(ours).frozen_cells == 0 && stats_of(ours).n_sequences == 1);
        llama_free(ours);
        llama_free(plain);
    }
}

TEST(embeddings_in, "a batch of embeddings, with logits for every token, gives upstream's; past the pool its tokens freeze and come back like others") {
    const int n_embd = llama_model_n_embd(load_model());
    const auto feed = [&](llama_context * c, int32_t begin, int32_t n) {
        llama_batch batch = llama_batch_init(n, n_embd, 1);
        batch.n_tokens = n;
        for (int32_t i = 0; i < n; ++i) {
            for (int d = 0; d < n_embd; ++d) {
                batch.embd[i*n_embd + d] = float(((begin + i)*31 + d*17) % 23 - 11)/11.0f;
            }
            batch.pos[i]       = begin + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = true;
        }
        const int status = llama_decode(c, batch);
        llama_batch_free(batch);
        return status;
    };
    llama_context * ours = make_context("asrkf,pool=2048"), * plain = make_context(nullptr);
    for (llama_context * c : { ours, plain }) {
        CHECK(feed(c, 0, 40) == 0);
    }
    bool same = true;
    for (int32_t i = 0; i < 40; ++i) {
        same = same && logits_of(ours, i) == logits_of(plain, i);
    }
    CHECK(same);
    CHECK(extend(ours, { 0 }, 3) == 0 && extend(plain, { 0 }, 3) == 0 && logits_of(ours, -1) == logits_of(plain, -1)); // then tokens
    llama_free(ours);
    llama_free(plain);
    llama_context * ctx = make_context("asrkf,pool=512");
    for (int32_t begin = 0; begin < 1600; begin += 100) {
        CHECK(feed(ctx, begin, 100) == 0);
    }
    const asrkf_stats s = stats_of(ctx);
    CHECK(s.tokens == 1600 && s.frozen_cells >= 1088 && s.rewalks_total == 0); // what came as embeddings cannot be computed again
    std::mt19937 random(1);
    witness watch(ctx);
    watch.check(random);
    CHECK(extend(ctx, { 0 }, 20) == 0 && asrkf_freeze(ctx, 0, 100, 200, nullptr) == ASRKF_OK && extend(ctx, { 0 }, 20) == 0);
    watch.check(random, 200);
    llama_free(ctx);
}

static void compare_streams(const std::string & policy, size_t n_ties) {
    options pair;
    pair.n_seq = 2;
    pair.n_ctx = 4096;
    llama_context * both = make_context((policy + ",pool=1024,rewalk_tokens=0").c_str(), pair);
    llama_context * alone[2];
    for (auto & c : alone) {
        c = make_context((policy + ",pool=512,rewalk_tokens=0").c_str());
    }
    CHECK(both && alone[0] && alone[1]);
    for (int i = 0; i < 6; ++i) { // one after the other, then side by side
        CHECK(extend(both, { i % 2 }, 128) == 0 && extend(alone[i % 2], { 0 }, 128, uint32_t(i % 2)) == 0);
    }
    for (int i = 0; i < 300; ++i) {
        CHECK(extend(both, { 0, 1 }, 1) == 0 && extend(alone[0], { 0 }, 1) == 0 && extend(alone[1], { 0 }, 1, 1) == 0);
    }
    for (int seq = 0; seq < 2; ++seq) {
        const auto together = states_of(both, seq), apart = states_of(alone[seq], 0);
        CHECK(together.size() == 684 && n_in_state(together, ASRKF_TOKEN_FROZEN) >= 684 - 512);
        size_t n_same = 0;
        for (size_t i = 0; i < together.size() && i < apart.size(); ++i) {
            n_same += together[i] == apart[i];
        }
        if (n_same + n_ties < apart.size()) {
            std::printf("%s: %zu of %zu tokens are in the same state\n", policy.c_str(), n_same, apart.size());
        }
        CHECK(together.size() == apart.size() && n_same + n_ties >= apart.size()); // of rounded scores
        llama_free(alone[seq]);
    }
    llama_free(both);
}

TEST(streams, "a stream decides as a context of its own does, whatever its neighbours do") {
    compare_streams("asrkf,score_layers=0-1", 4);
    compare_streams("asrkf,score=magnitude,score_layers=0-1", 20); // magnitudes lie close together
    compare_streams("paper,tau=0.5,score_layers=0-1", 40);
}

TEST(fair_share, "four sequences longer than the pool together: none is starved, the bound holds, and no row changes") {
    for (const bool unified : { true, false }) {
        options o;
        o.n_seq   = 4;
        o.n_ctx   = 8192;
        o.unified = unified;
        llama_context * ctx = make_context("asrkf,pool=1024", o);
        CHECK(ctx);
        const uint64_t device_bytes = stats_of(ctx).device_kv_bytes;
        CHECK(extend(ctx, { 0 }, 500) == 0 && extend(ctx, { 0 }, 500) == 0); // alone: the whole pool, where it is one
        CHECK(n_in_state(states_of(ctx, 0), ASRKF_TOKEN_ACTIVE) > (unified ? 900u : 200u));
        const auto early = row_at(ctx, 0, 0, 300);
        for (int i = 0; i < 8; ++i) {
            CHECK(extend(ctx, { 0, 1, 2, 3 }, 60) == 0);
        }
        for (int i = 0; i < 40; ++i) {
            CHECK(extend(ctx, { 0, 1, 2, 3 }, 1) == 0);
        }
        const asrkf_stats s = stats_of(ctx);
        CHECK(s.tokens == 1000 + 4*520 && s.active_cells <= 1024 && s.n_sequences == 4 && s.device_kv_bytes == device_bytes);
        for (int seq = 0; seq < 4; ++seq) {
            const auto states = states_of(ctx, seq);
            const size_t n = n_in_state(states, ASRKF_TOKEN_ACTIVE);
            CHECK(n > 240 && n <= 256); // a quarter each
            const size_t window = 128;
            for (size_t i = states.size() - window; i < states.size(); ++i) {
                CHECK(states[i] != ASRKF_TOKEN_FROZEN);
            }
            CHECK(states[0] != ASRKF_TOKEN_FROZEN && states[3] != ASRKF_TOKEN_FROZEN);
        }
        CHECK(row_at(ctx, 0, 0, 300) == early);
        llama_memory_t mem = llama_get_memory(ctx);
        CHECK(llama_memory_seq_rm(mem, 1, -1, -1) && llama_memory_seq_rm(mem, 2, -1, -1) && llama_memory_seq_rm(mem, 3, -1, -1));
        CHECK(stats_of(ctx).tokens == 1520);
        CHECK(extend(ctx, { 0 }, 1) == 0);
        CHECK(n_in_state(states_of(ctx, 0), ASRKF_TOKEN_ACTIVE) > (unified ? 1000u : 240u)); // what they leave is its own again
        llama_free(ctx);
    }
}

TEST(graph_of_sequences, "steps of several sequences use their graph again, whichever of them score; drafts as well") {
    for (const bool unified : { true, false }) {
        for (const char * policy : { "asrkf,pool=1024", "asrkf,pool=1024,recall=mean_key" }) {
            options o;
            o.n_seq   = 3;
            o.n_ctx   = 6144;
            o.unified = unified;
            llama_context * ctx = make_context(policy, o);
            CHECK(ctx);
            CHECK(extend(ctx, { 0 }, 500) == 0 && extend(ctx, { 1 }, 500) == 0 && extend(ctx, { 2 }, 500) == 0);
            CHECK(extend(ctx, { 1 }, 3) == 0 && extend(ctx, { 2 }, 5) == 0); // so that they score in turn
            for (const int n : { 1, 3 }) {
                const uint64_t scored_before = stats_of(ctx).scoring_steps_total;
                llama_perf_context_reset(ctx);
                for (int i = 0; i < 30; ++i) {
                    CHECK(extend(ctx, { 0, 1, 2 }, n) == 0);
                }
                CHECK(llama_perf_context(ctx).n_reused == 29);
                CHECK(stats_of(ctx).scoring_steps_total - scored_before >= 3);
            }
            llama_free(ctx);
        }
    }
}

TEST(failing_scores, "where a device fails to score, the step has no scores and says so; the policy goes by those it has") {
    llama_context * ctx = make_context("asrkf,pool=512,layers=shared,rewalk_tokens=0");
    CHECK(ctx);
    CHECK(extend(ctx, { 0 }, 400) == 0 && extend(ctx, { 0 }, 300) == 0);
    const uint64_t scored = stats_of(ctx).scoring_steps_total;
    for (int i = 0; i < 32; ++i) {
        fail_scoring_in = 1;
        CHECK(extend(ctx, { 0 }, 1) == 0);
    }
    fail_scoring_in = 0;
    CHECK(stats_of(ctx).scoring_steps_total == scored);
    CHECK(std::string(asrkf_last_error()).find("failed to compute a step's scores") != std::string::npos);
    for (int i = 0; i < 32; ++i) {
        CHECK(extend(ctx, { 0 }, 1) == 0);
    }
    CHECK(stats_of(ctx).scoring_steps_total >= scored + 3 && stats_of(ctx).tokens == 764);
    llama_free(ctx);
}

TEST(shared_prefix, "a prefix that sequences share is one record, on the device or on the host; each decides for itself") {
    options o;
    o.n_seq   = 3;
    o.n_ctx   = 4096;
    o.unified = true;
    llama_context * ctx = make_context("asrkf,pool=768,window=64,rewalk_tokens=0", o);
    CHECK(ctx && extend(ctx, { 0 }, 400) == 0 && extend(ctx, { 0 }, 400) == 0);
    const asrkf_stats before = stats_of(ctx);
    CHECK(before.frozen_cells > 0);
    llama_memory_t mem = llama_get_memory(ctx);
    llama_memory_seq_cp(mem, 0, 1, -1, -1);
    llama_memory_seq_cp(mem, 0, 2, 0, 600);
    const asrkf_stats s = stats_of(ctx);
    CHECK(s.tokens == 800 && s.host_kv_bytes == before.host_kv_bytes && s.n_sequences == 3);
    CHECK(states_of(ctx, 0) == states_of(ctx, 1) && states_of(ctx, 2).size() == 600);
    const auto row = row_at(ctx, 0, 0, 200);
    for (int i = 0; i < 30; ++i) {
        CHECK(extend(ctx, { 0, 1, 2 }, 5) == 0);
    }
    CHECK(stats_of(ctx).tokens == 800 + 3*150 && stats_of(ctx).active_cells <= 768);
    for (int seq = 0; seq < 3; ++seq) {
        CHECK(row_at(ctx, seq, 0, 200) == row);
    }
    // frozen for one, active for another
    CHECK(asrkf_restore(ctx, 0, 100, 110, nullptr) == ASRKF_OK && asrkf_restore(ctx, 1, 100, 110, nullptr) == ASRKF_OK);
    const uint32_t used = group_of(ctx, 0).active_cells;
    CHECK(asrkf_freeze(ctx, 0, 100, 110, nullptr) == ASRKF_OK);
    CHECK(states_of(ctx, 0)[105] == ASRKF_TOKEN_FROZEN && states_of(ctx, 1)[105] == ASRKF_TOKEN_ACTIVE_COPIED && group_of(ctx, 0).active_cells == used);
    CHECK(llama_memory_seq_rm(mem, 1, -1, -1)); // the one that has it active goes: the other's bytes are safe
    CHECK(states_of(ctx, 0)[105] == ASRKF_TOKEN_FROZEN && row_at(ctx, 0, 0, 200) == row);
    // a shift of one leaves the other's rows alone
    llama_memory_seq_rm(mem, 2, 0, 50);
    llama_memory_seq_add(mem, 2, 50, -1, -50);
    CHECK(row_at(ctx, 0, 0, 200) == row && row_at(ctx, 2, 0, 150) != row);
    CHECK(extend(ctx, { 0, 2 }, 2) == 0);
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1) && llama_memory_seq_rm(mem, 2, -1, -1));
    CHECK(stats_of(ctx).tokens == 0 && stats_of(ctx).host_kv_bytes == 0);
    llama_free(ctx);
}

TEST(shifts, "a shift rotates frozen rows as upstream rotates its own, bit for bit on one device") {
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const char * policy : { "asrkf,pool=512,rewalk_tokens=0", "asrkf,layers=0@512/1@768,moves=staged,rewalk_tokens=0" }) {
            options o;
            o.type = type;
            llama_context * ours  = make_context(policy, o);
            llama_context * whole = make_context("asrkf,pool=2048", o); // nothing frozen: upstream's cells
            llama_context * plain = make_context(nullptr, o);
            for (llama_context * c : { ours, whole, plain }) {
                CHECK(llama_memory_can_shift(llama_get_memory(c)));
                CHECK(extend(c, { 0 }, 400) == 0 && extend(c, { 0 }, 400) == 0);
            }
            CHECK(stats_of(ours).frozen_cells > 0);
            // the same rows everywhere: those of upstream's cache
            const auto copy = saved(plain);
            CHECK(llama_state_set_data(ours, copy.data(), copy.size()) == copy.size() && llama_state_set_data(whole, copy.data(), copy.size()) == copy.size());
            for (llama_context * c : { ours, whole, plain }) {
                CHECK(extend(c, { 0 }, 1) == 0);
                llama_memory_t mem = llama_get_memory(c);
                CHECK(llama_memory_can_shift(mem));
                llama_memory_seq_rm(mem, 0, 4, 204);
                divide(c, 0, 204, 404, 2); // each row once: upstream adds shifts up, and rounds once
                llama_memory_seq_add(mem, 0, 404, -1, -200);
            }
            CHECK(stats_of(ours).frozen_cells > 0 && llama_memory_seq_pos_max(llama_get_memory(ours), 0) == 600);
            llama_memory_seq_rm(llama_get_memory(ours), 0, 600, -1); // the newest was computed on other attention
            llama_memory_seq_rm(llama_get_memory(whole), 0, 600, -1);
            size_t n_same = 0, n = 0;
            for (int32_t p = 0; p < 600; ++p) {
                if (p >= 4 && p < 204) {
                    continue; // two tokens have each of these, or none
                }
                std::vector<uint8_t> row;
                for (uint32_t ig = 0; ig < stats_of(ours).n_groups; ++ig) {
                    const auto part = row_at(ours, 0, ig, p);
                    row.insert(row.end(), part.begin(), part.end());
                }
                n_same += row == row_at(whole, 0, 0, p);
                n++;
            }
            CHECK(n == 400 && n_same == n);
            CHECK(extend(whole, { 0 }, 1) == 0);
            llama_memory_seq_rm(llama_get_memory(plain), 0, 600, -1);
            CHECK(extend(plain, { 0 }, 1) == 0 && logits_of(whole, -1) == logits_of(plain, -1));
            CHECK(extend(ours, { 0 }, 1) == 0 && stats_of(ours).active_cells <= 768);
            for (llama_context * c : { ours, whole, plain }) {
                llama_free(c);
            }
        }
    }
}

TEST(unservable_copies, "what cannot be done makes the sequence's next decode fail with the reason, until it is emptied; others go on") {
    llama_context * ctx = make_context("asrkf,pool=512");
    llama_memory_t mem = llama_get_memory(ctx);
    CHECK(decode(ctx, { 1, 2, 3 }) == 0);
    llama_memory_seq_cp(mem, 0, 1, 0, -1);
    CHECK(std::strstr(asrkf_last_error(), "there is no sequence 1: this context has 1") != nullptr);
    CHECK(decode(ctx, { 4 }) == 0 && extend(ctx, { 1 }, 2) != 0 && std::strstr(asrkf_last_error(), "there is no sequence 1") != nullptr);
    llama_free(ctx);
    options o;
    o.n_seq   = 2;
    o.n_ctx   = 1024;
    o.unified = true;
    ctx = make_context("asrkf,pool=768", o);
    mem = llama_get_memory(ctx);
    CHECK(extend(ctx, { 0 }, 300) == 0 && extend(ctx, { 0 }, 300) == 0);
    llama_memory_seq_cp(mem, 0, 1, -1, -1);
    CHECK(extend(ctx, { 0, 1 }, 10) == 0);
    llama_memory_seq_add(mem, 1, 0, -1, 5); // needs copies of 600 rows that they share, and the context has no room for them
    CHECK(extend(ctx, { 1 }, 1) != 0 && std::strstr(asrkf_last_error(), "could not be shifted") && std::strstr(asrkf_last_error(), "context is full"));
    CHECK(llama_state_get_size(ctx) == 0 && llama_state_seq_get_size(ctx, 1) == 0 && llama_state_seq_get_size(ctx, 0) > 0); // nor saved as if it were whole
    CHECK(extend(ctx, { 0 }, 1) == 0);
    CHECK(llama_memory_seq_rm(mem, 1, -1, -1) && extend(ctx, { 0, 1 }, 3) == 0);
    llama_free(ctx);
}

TEST(coupled_held, "a pool that holds all freezes nothing, however many sequences share its tokens; an index of means has a row for all") {
    for (const char * policy : { "asrkf,pool=1024", "asrkf,pool=1024,recall=mean_key" }) {
        options o;
        o.n_seq   = 4;
        o.n_ctx   = 1024;
        o.unified = true;
        llama_context * ctx = make_context(policy, o);
        std::vector<token_in> tokens;
        for (int32_t p = 0; p < 300; ++p) {
            tokens.push_back({ some_token(1, p), p, { 0, 1, 2, 3 }, p == 299 });
        }
        CHECK(decode_batch(ctx, tokens) == 0 && extend(ctx, { 0, 1, 2, 3 }, 100) == 0);
        CHECK(stats_of(ctx).tokens == 700 && stats_of(ctx).frozen_cells == 0 && stats_of(ctx).freezes_total == 0);
        llama_free(ctx);
    }
}

TEST(uneven, "a short sequence beside a long one keeps all it has, and neither decides with every token") {
    options o;
    o.n_seq   = 2;
    o.n_ctx   = 8192;
    o.unified = true;
    llama_context * ctx = make_context("asrkf,pool=2048,rewalk_tokens=0", o);
    CHECK(extend(ctx, { 1 }, 100) == 0);
    for (int i = 0; i < 8; ++i) {
        CHECK(extend(ctx, { 0 }, 500) == 0);
    }
    const uint64_t before = stats_of(ctx).decisions_total;
    for (int i = 0; i < 160; ++i) {
        CHECK(extend(ctx, { 0, 1 }, 1) == 0);
    }
    CHECK(n_in_state(states_of(ctx, 1), ASRKF_TOKEN_FROZEN) == 0 && n_in_state(states_of(ctx, 0), ASRKF_TOKEN_ACTIVE) > 1400);
    CHECK(stats_of(ctx).decisions_total - before <= stats_of(ctx).n_groups*2*(160/8 + 4));
    llama_free(ctx);
}

TEST(raised_limit, "from a host limit that is reached all works: raising it, removing tokens, saving the state") {
    const auto at_the_limit = [] {
        llama_context * ctx = make_context("asrkf,pool=512,host_limit=300kB,rewalk_tokens=0");
        int n = 0;
        while (extend(ctx, { 0 }, 50) == 0) {
            n += 50;
        }
        CHECK(asrkf_last_status() == ASRKF_HOST_LIMIT && n > 512 && stats_of(ctx).tokens == uint64_t(n));
        return ctx;
    };
    llama_context * ctx = at_the_limit();
    const asrkf_stats before = stats_of(ctx);
    CHECK(asrkf_set_host_limit(ctx, before.host_kv_bytes - 1) == ASRKF_HOST_LIMIT && extend(ctx, { 0 }, 50) != 0);
    CHECK(asrkf_set_host_limit(ctx, 600000) == ASRKF_OK && extend(ctx, { 0 }, 50) == 0 && extend(ctx, { 0 }, 50) == 0);
    CHECK(stats_of(ctx).host_kv_peak_bytes <= 600000);
    llama_free(ctx);
    ctx = at_the_limit();
    const auto blob = saved(ctx);
    const uint64_t n = stats_of(ctx).tokens;
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx), 0, 400, -1) && extend(ctx, { 0 }, 50) == 0);
    llama_context * other = make_context("asrkf,pool=512");
    CHECK(llama_state_set_data(other, blob.data(), blob.size()) == blob.size() && extend(other, { 0 }, 50) == 0 && stats_of(other).tokens == n + 50);
    llama_free(other);
    llama_free(ctx);
}

TEST(pins_stay, "pins are of positions: a shift leaves them where they are") {
    llama_context * ctx = make_context("asrkf,pool=512,rewalk_tokens=0");
    CHECK(extend(ctx, { 0 }, 400) == 0 && asrkf_pin(ctx, 0, 100, 120) == ASRKF_OK);
    for (int i = 0; i < 12; ++i) { // many context shifts
        llama_memory_seq_rm(llama_get_memory(ctx), 0, 4, 54);
        llama_memory_seq_add(llama_get_memory(ctx), 0, 54, -1, -50);
        CHECK(extend(ctx, { 0 }, 250) == 0);
        CHECK(asrkf_freeze(ctx, 0, 110, 111, nullptr) == ASRKF_PROTECTED && asrkf_freeze(ctx, 0, 60, 61, nullptr) == ASRKF_OK);
        if (llama_memory_seq_pos_max(llama_get_memory(ctx), 0) > 1500) {
            llama_memory_seq_rm(llama_get_memory(ctx), 0, 600, -1);
        }
    }
    llama_free(ctx);
}

TEST(policy_state, "a state carries scores and timers: what was active is active again, in any pool that holds it; explicit freezes last") {
    llama_context * ctx = make_context("asrkf,pool=512,rewalk_tokens=0");
    std::mt19937 random(3);
    for (int i = 0; i < 5; ++i) {
        std::vector<llama_token> tokens;
        for (int t = 0; t < 200; ++t) {
            tokens.push_back(llama_token(random() % 250));
        }
        CHECK(decode(ctx, tokens) == 0);
    }
    for (int i = 0; i < 50; ++i) {
        CHECK(decode(ctx, { llama_token(random() % 250) }) == 0);
    }
    CHECK(asrkf_freeze(ctx, 0, 10, 20, nullptr) == ASRKF_OK && asrkf_pin(ctx, 0, 40, 45) == ASRKF_OK && decode(ctx, { 1 }) == 0);
    const auto blob = saved(ctx);
    const auto states = states_of(ctx, 0);
    const llama_token next = 77;
    CHECK(decode(ctx, { next }) == 0);
    for (const char * policy : { "asrkf,pool=512,rewalk_tokens=0", "asrkf,layers=0@512/1@768", "asrkf,pool=1024" }) {
        llama_context * other = make_context(policy);
        CHECK(llama_state_set_data(other, blob.data(), blob.size()) == blob.size());
        CHECK(decode(other, { next }) == 0);
        const auto loaded = states_of(other, 0, stats_of(other).n_groups - 1);
        size_t n_lost = 0;
        for (size_t i = 0; i < states.size(); ++i) {
            n_lost += states[i] != ASRKF_TOKEN_FROZEN && loaded[i] == ASRKF_TOKEN_FROZEN;
        }
        CHECK(n_lost <= 8); // the new token, and the slack of a decision
        CHECK(n_in_state(std::vector<uint8_t>(loaded.begin() + 10, loaded.begin() + 20), ASRKF_TOKEN_FROZEN) == 10);
        CHECK(loaded[42] != ASRKF_TOKEN_FROZEN && asrkf_freeze(other, 0, 42, 43, nullptr) == ASRKF_PROTECTED);
        llama_free(other);
    }
    // of one sequence, into another one of another context; a wrong version and a wrong model
    std::vector<uint8_t> one(llama_state_seq_get_size(ctx, 0));
    CHECK(llama_state_seq_get_data(ctx, one.data(), one.size(), 0) == one.size());
    options o;
    o.n_seq = 2;
    o.n_ctx = 4096;
    llama_context * other = make_context("asrkf,pool=1024", o);
    CHECK(extend(other, { 0, 1 }, 20) == 0);
    CHECK(llama_state_seq_set_data(other, one.data(), one.size(), 1) == one.size());
    CHECK(llama_memory_seq_pos_max(llama_get_memory(other), 1) == 1051 && llama_memory_seq_pos_max(llama_get_memory(other), 0) == 19);
    CHECK(extend(other, { 0, 1 }, 3) == 0);
    std::vector<uint8_t> device(llama_state_seq_get_size_ext(ctx, 0, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE)); // what is frozen is not there: held on the host
    CHECK(llama_state_seq_get_data_ext(ctx, device.data(), device.size(), 0, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) == device.size());
    const auto row = row_at(ctx, 0, 0, 300);
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx), 0, -1, -1));
    CHECK(llama_state_seq_set_data_ext(ctx, device.data(), device.size(), 0, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) == device.size() && row_at(ctx, 0, 0, 300) == row);
    auto wrong = one;
    const auto mark = std::search(wrong.begin(), wrong.end(), "ASRK", "ASRK" + 4);
    CHECK(mark != wrong.end());
    mark[4]++;
    CHECK(llama_state_seq_set_data(other, wrong.data(), wrong.size(), 1) == 0 && std::strstr(asrkf_last_error(), "version 2, this library reads 1"));
    CHECK(llama_memory_seq_pos_max(llama_get_memory(other), 1) == 1054);
    llama_free(other);
    llama_free(ctx);
}

namespace {

// All that a random history shows: logits, what attention missed, and in the end who is frozen.
std::vector<float> trail(const char * policy, options o, uint32_t seed, bool makes_anew) {
    asrkf::makes_anew = makes_anew;
    std::mt19937 random(seed);
    std::vector<float> seen;
    llama_context * ctx = make_context(policy, o);
    llama_memory_t mem = llama_get_memory(ctx);
    const int32_t n_ctx_seq = int32_t(o.n_ctx) / int32_t(o.n_seq);
    for (int i = 0; i < 500; ++i) {
        const llama_seq_id seq = llama_seq_id(random() % o.n_seq), next = llama_seq_id((uint32_t(seq) + 1) % o.n_seq);
        const llama_pos end = llama_memory_seq_pos_max(mem, seq) + 1;
        const uint32_t what = random() % 100, where = random();
        const llama_pos p0 = end > 0 ? llama_pos(where % uint32_t(end)) : 0, p1 = std::min(end, p0 + 1 + llama_pos(where / 4096 % 50));
        if (what < 80) {
            std::vector<llama_seq_id> seqs;
            const int n = what < 60 ? 1 : 1 + int(where % 40);
            for (uint32_t q = 0; q < o.n_seq; ++q) {
                if (llama_memory_seq_pos_max(mem, llama_seq_id(q)) + n >= n_ctx_seq) {
                    llama_memory_seq_rm(mem, llama_seq_id(q), n_ctx_seq*3/4, -1);
                }
                if (llama_seq_id(q) == seq || where >> q & 1) {
                    seqs.push_back(llama_seq_id(q));
                }
            }
            CHECK(extend(ctx, seqs, n, where) == 0);
            for (size_t j = 0; j < seqs.size(); ++j) {
                const std::vector<float> logits = logits_of(ctx, -1 - int32_t(j));
                seen.insert(seen.end(), logits.begin(), logits.end());
            }
        } else if (what < 84) {
            llama_memory_seq_rm(mem, seq, std::max(p0, end - 30), -1);
        } else if (what < 88 && end > 0) {
            llama_memory_seq_rm(mem, seq, p0, p1);
            llama_memory_seq_add(mem, seq, p1, -1, p0 - p1);
        } else if (what < 91 && next != seq) {
            llama_memory_seq_rm(mem, next, -1, -1);
            llama_memory_seq_cp(mem, seq, next, -1, -1);
        } else if (what < 94 && end > 0) {
            std::vector<uint8_t> state(llama_state_seq_get_size(ctx, seq));
            CHECK(llama_state_seq_get_data(ctx, state.data(), state.size(), seq) == state.size());
            CHECK(llama_state_seq_set_data(ctx, state.data(), state.size(), next) == state.size());
        } else if (what < 97) {
            asrkf_freeze(ctx, seq, p0, p1, nullptr);
        } else {
            asrkf_restore(ctx, seq, p0, p1, nullptr);
        }
        const asrkf_stats s = stats_of(ctx);
        seen.insert(seen.end(), { s.missed_attention_ratio, s.missed_attention_worst_ratio, float(s.freezes_total), float(s.n_sequences) });
    }
    CHECK(stats_of(ctx).freezes_total > 100 && stats_of(ctx).scoring_steps_total > 20);
    for (uint32_t q = 0; q < o.n_seq; ++q) {
        for (const uint8_t state : states_of(ctx, int(q))) {
            seen.push_back(state);
        }
    }
    llama_free(ctx);
    asrkf::makes_anew = false;
    return seen;
}

} // namespace

TEST(kept, "masks and counts that are kept from step to step are those that are made anew: a history shows no difference") {
    options several;
    several.n_seq = 3;
    several.n_ctx = 3072;
    for (const bool unified : { true, false }) {
        several.unified = unified;
        for (const char * policy : { "asrkf,layers=0@768/1@1024", "asrkf,pool=768,recall=mean_key" }) {
            CHECK(trail(policy, several, 7, false) == trail(policy, several, 7, true));
        }
    }
    for (const char * policy : { "asrkf,layers=0@512/1@768", "asrkf,pool=512,recall=mean_key", "paper,pool=512,tau=0.5" }) {
        CHECK(trail(policy, {}, 8, false) == trail(policy, {}, 8, true));
    }
}

TEST(two_threads, "two contexts in two threads keep their settings and errors apart") {
    load_model();
    std::vector<std::thread> threads;
    int n_good = 0;
    std::string texts[2];
    bool good[2] = { false, false };
    for (int i = 0; i < 2; ++i) {
        threads.emplace_back([i, &good, &texts] {
            asrkf_config config;
            config.struct_size = sizeof(config);
            asrkf_config_parse(i ? "asrkf,pool=512" : "window,pool=768", &config);
            asrkf_next_context(&config);
            llama_context_params params = llama_context_default_params();
            params.n_ctx = 2048;
            params.n_threads = params.n_threads_batch = 1;
            params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
            llama_context * ctx = llama_init_from_model(load_model(), params);
            if (ctx) {
                for (int t = 0; t < 30; ++t) {
                    decode(ctx, std::vector<llama_token>(40, t));
                }
                asrkf_stats s;
                s.struct_size = sizeof(s);
                good[i] = asrkf_get_stats(ctx, &s) == ASRKF_OK && s.pool_cells == (i ? 512u : 768u) && s.tokens == 1200 && s.frozen_cells > 0;
                llama_free(ctx);
            }
            texts[i] = asrkf_last_error();
        });
    }
    for (int i = 0; i < 2; ++i) {
        threads[size_t(i)].join();
        n_good += good[i];
    }
    CHECK(n_good == 2 && texts[0].empty() && texts[1].empty());
}

int main() {
    llama_backend_init();
    const int failed = run_all_tests();
    llama_model_free(load_model());
    llama_backend_free();
    return failed;
}
