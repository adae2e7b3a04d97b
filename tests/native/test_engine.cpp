// The memory under llama_decode, on a two-layer model: random operations against a dense copy of every row.
// Seeds are printed; ASRKF_TEST_SEED runs one, ASRKF_TEST_OPERATIONS how many operations each machine makes.
#include "check.h"

#include "asrkf.h"
#include "llama.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <thread>

namespace {

llama_model * load_model() {
    static llama_model * model = [] {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        const char * path = std::getenv("ASRKF_TEST_MODEL");
        if (!path) {
            std::printf("ASRKF_TEST_MODEL is not set\n");
            std::exit(2);
        }
        llama_model_params params = llama_model_default_params();
        params.n_gpu_layers = 0;
        llama_model * loaded = llama_model_load_from_file(path, params);
        if (!loaded) {
            std::printf("%s cannot be loaded\n", path);
            std::exit(2);
        }
        return loaded;
    }();
    return model;
}

struct options {
    ggml_type type    = GGML_TYPE_F16;
    uint32_t  n_ctx   = 2048;
    uint32_t  n_batch = 512;
    bool      flash   = true;
    uint32_t  n_seq   = 1;
};

llama_context * make_context(const char * policy, options o = {}) {
    if (policy) {
        asrkf_config config;
        config.struct_size = sizeof(config);
        if (asrkf_config_parse(policy, &config) != ASRKF_OK || asrkf_next_context(&config) != ASRKF_OK) {
            return nullptr;
        }
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = o.n_ctx;
    params.n_batch         = o.n_batch;
    params.n_ubatch        = o.n_batch;
    params.n_seq_max       = o.n_seq;
    params.n_threads       = params.n_threads_batch = 1;
    params.type_k          = params.type_v = o.type;
    params.flash_attn_type = o.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return llama_init_from_model(load_model(), params);
}

int decode(llama_context * ctx, std::vector<llama_token> tokens) {
    return llama_decode(ctx, llama_batch_get_one(tokens.data(), int32_t(tokens.size())));
}

asrkf_stats stats_of(llama_context * ctx) {
    asrkf_stats s;
    s.struct_size = sizeof(s);
    CHECK(asrkf_get_stats(ctx, &s) == ASRKF_OK);
    return s;
}

asrkf_group_stats group_of(llama_context * ctx, uint32_t index) {
    asrkf_group_stats s;
    s.struct_size = sizeof(s);
    CHECK(asrkf_get_group_stats(ctx, index, &s) == ASRKF_OK);
    return s;
}

// What must hold after every call: contract 5, the bound, and every sampled row as it was when it was computed.
class witness {
public:
    explicit witness(llama_context * ctx) : ctx(ctx), device_bytes(stats_of(ctx).device_kv_bytes) {}

    void check(std::mt19937 & random) {
        const asrkf_stats s = stats_of(ctx);
        const llama_pos last = llama_memory_seq_pos_max(llama_get_memory(ctx), 0);
        CHECK(s.device_kv_bytes == device_bytes);
        CHECK(int64_t(s.tokens) == int64_t(last) + 1);
        CHECK(s.host_kv_peak_bytes >= s.host_kv_bytes);
        rows.resize(s.n_groups);
        for (uint32_t ig = 0; ig < s.n_groups; ++ig) {
            const asrkf_group_stats g = group_of(ctx, ig);
            std::vector<int32_t> pos(s.tokens);
            std::vector<uint8_t> state(s.tokens);
            size_t n = 0;
            CHECK(asrkf_get_tokens(ctx, ig, pos.data(), state.data(), pos.size(), &n) == ASRKF_OK);
            CHECK(n == s.tokens);
            const auto count = [&](int wanted) { return size_t(std::count(state.begin(), state.end(), uint8_t(wanted))); };
            CHECK(count(ASRKF_TOKEN_ACTIVE) + count(ASRKF_TOKEN_ACTIVE_COPIED) == g.active_cells);
            CHECK(count(ASRKF_TOKEN_FROZEN) == g.frozen_cells);
            CHECK(g.active_cells + g.frozen_cells == s.tokens);
            CHECK(g.active_cells <= g.pool_cells);
            for (size_t i = 0; i < n; ++i) {
                CHECK(pos[i] == int32_t(i));
            }
            // rows of tokens that are gone, and those that the end of a prompt has computed again
            rows[ig].erase(rows[ig].lower_bound(int32_t(s.tokens)), rows[ig].end());
            if (s.rewalks_total != n_rewalks) {
                rows[ig].erase(rows[ig].lower_bound(int32_t(std::min(s.tokens, n_tokens)) - REWALK_TOKENS), rows[ig].end());
            }
            for (int32_t p = int32_t(rows[ig].size()); p < int32_t(s.tokens); ++p) {
                rows[ig][p] = read(ig, p, g.token_bytes);
            }
            for (int i = 0; i < 8 && s.tokens > 0; ++i) {
                const int32_t p = int32_t(random() % s.tokens);
                if (read(ig, p, g.token_bytes) != rows[ig][p]) {
                    std::printf("group %u: the row of position %d changed\n", ig, p);
                    CHECK(false);
                }
            }
        }
        n_rewalks = s.rewalks_total;
        n_tokens  = s.tokens;
    }

    static constexpr int32_t REWALK_TOKENS = 48; // the default

    void check_all_rows() {
        const asrkf_stats s = stats_of(ctx);
        for (uint32_t ig = 0; ig < s.n_groups; ++ig) {
            const size_t size = group_of(ctx, ig).token_bytes;
            bool same = true;
            for (const auto & [p, row] : rows[ig]) {
                same = same && read(ig, p, size) == row;
            }
            CHECK(same);
        }
    }

private:
    std::vector<uint8_t> read(uint32_t ig, int32_t pos, size_t size) const {
        std::vector<uint8_t> row(size);
        CHECK(asrkf_get_rows(ctx, ig, pos, row.data(), row.size()) == ASRKF_OK);
        return row;
    }

    llama_context *                                      ctx;
    uint64_t                                             device_bytes;
    uint64_t                                             n_rewalks = 0;
    uint64_t                                             n_tokens  = 0; // at the last check
    std::vector<std::map<int32_t, std::vector<uint8_t>>> rows; // by group and position
};

bool abort_now(void * data) { return *static_cast<bool *>(data); }

void machine(const char * policy, options o, uint32_t seed, int n_operations) {
    std::mt19937 random(seed);
    llama_context * ctx = make_context(policy, o);
    CHECK(ctx != nullptr);
    if (!ctx) {
        std::printf("%s: %s\n", policy, asrkf_last_error());
        return;
    }
    bool aborting = false;
    llama_set_abort_callback(ctx, abort_now, &aborting);
    llama_memory_t mem = llama_get_memory(ctx);
    witness watch(ctx);
    const auto n_tokens = [&] { return int32_t(llama_memory_seq_pos_max(mem, 0) + 1); };
    uint64_t n_frozen_seen = 0;
    for (int i = 0; i < n_operations; ++i) {
        const int32_t n = n_tokens();
        const uint32_t what = random() % 100;
        if (what < 70) {
            const int32_t room = int32_t(o.n_ctx) - n;
            const int32_t wanted = what < 60 ? 1 : 1 + int32_t(random() % o.n_batch);
            if (wanted > room) {
                CHECK(decode(ctx, std::vector<llama_token>(size_t(room) + 1, 1)) != 0); // refused, and nothing changed
                CHECK(n_tokens() == n);
                llama_memory_seq_rm(mem, 0, n/2, -1);
            } else {
                std::vector<llama_token> tokens;
                for (int32_t t = 0; t < wanted; ++t) {
                    tokens.push_back(llama_token(random() % 256));
                }
                aborting = what == 0;
                const int status = decode(ctx, tokens);
                // a host limit may refuse the step; an abort gives back what was not computed
                CHECK(status == 0 ? n_tokens() == n + wanted : n_tokens() >= n && n_tokens() <= n + wanted);
                aborting = false;
            }
        } else if (what < 78 && n > 0) {
            const int32_t p0 = int32_t(random() % uint32_t(n)), p1 = p0 + 1 + int32_t(random() % 40);
            uint64_t moved = 0;
            const asrkf_status status = asrkf_freeze(ctx, 0, p0, p1, &moved);
            CHECK(status == ASRKF_OK || status == ASRKF_PROTECTED || status == ASRKF_HOST_LIMIT);
            CHECK(status == ASRKF_OK || moved == 0);
        } else if (what < 86 && n > 0) {
            const int32_t p0 = int32_t(random() % uint32_t(n)), p1 = p0 + 1 + int32_t(random() % 80);
            uint64_t moved = 0;
            const asrkf_status status = asrkf_restore(ctx, 0, p0, p1, &moved);
            CHECK(status == ASRKF_OK || status == ASRKF_POOL_FULL);
        } else if (what < 90 && n > 0) {
            const int32_t p0 = int32_t(random() % uint32_t(n));
            asrkf_pin(ctx, 0, p0, p0 + int32_t(random() % 8)); // may be refused: then the pool is too small for it
        } else if (what < 93) {
            CHECK(asrkf_unpin(ctx, 0, 0, -1) == ASRKF_OK);
        } else if (what < 97 && n > 0) {
            CHECK(llama_memory_seq_rm(mem, 0, n - 1 - int32_t(random() % uint32_t(std::min(n, 200))), -1));
        } else if (what < 98) {
            CHECK(llama_memory_seq_rm(mem, 0, n, -1)); // llama-cpp-python does this before every token
        } else if (what == 98 && random() % 4 == 0) {
            llama_memory_clear(mem, random() % 2);
        }
        n_frozen_seen += stats_of(ctx).frozen_cells;
        const int before = n_failed_checks;
        watch.check(random);
        if (n_failed_checks != before) {
            std::printf("machine \"%s\", seed %u, operation %d (%u)\n", policy, seed, i, what);
            break;
        }
    }
    watch.check_all_rows();
    CHECK(n_frozen_seen > 0);
    llama_free(ctx);
}

} // namespace

TEST(random_machine, "random decodes, freezes, restores, pins and removals never lose or change a row") {
    const char * one   = std::getenv("ASRKF_TEST_SEED");
    const char * count = std::getenv("ASRKF_TEST_OPERATIONS");
    const int n = count ? std::atoi(count) : 300;
    const uint32_t first = one ? uint32_t(std::atol(one)) : 1;
    std::printf("     seeds %u, %u; %d operations each\n", first, first + 1, n);
    for (uint32_t seed = first; seed < first + (one ? 1u : 2u); ++seed) {
        for (const char * moves : { "direct", "staged" }) {
            for (const char * policy : { "asrkf,pool=512", "asrkf,layers=0@512/1@768", "flag-all,pool=512", "paper,pool=512,tau=0.5", "random,pool=512,window=64",
                    "asrkf,pool=512,recall=mean_key", "window,pool=512", "asrkf,pool=512,host_limit=300kB" }) {
                machine((std::string(policy) + ",moves=" + moves).c_str(), {}, seed, n);
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
        CHECK(asrkf_get_rows(ctx, group, int32_t(pos), rows.back().data(), rows.back().size()) == ASRKF_OK);
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
    CHECK(asrkf_get_tokens(ctx, 0, pos.data(), state.data(), pos.size(), &n) == ASRKF_OK && n == 1030);
    CHECK(uint32_t(std::count(state.begin(), state.end(), uint8_t(ASRKF_TOKEN_FROZEN))) == group_of(ctx, 0).frozen_cells);
    std::vector<uint8_t> row(group_of(ctx, 0).token_bytes);
    for (const int32_t p : pos) {
        CHECK(asrkf_get_rows(ctx, 0, p, row.data(), row.size()) == ASRKF_OK); // no token is nowhere
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
    refused("asrkf", {}, "no pool");
    refused("asrkf,pool=4096", {}, "larger than n_ctx 2048");
    refused("asrkf,pool=256,window=200", {}, "raise kv_pool to at least 512 or lower window");
    refused("asrkf,pool=512,pinned=0-400", {}, "raise kv_pool to at least 1024");
    refused("asrkf,layers=0@512", {}, "layer 1 is in no group");
    refused("asrkf,layers=0-1@512/1@512", {}, "layer 1 is in two groups");
    refused("asrkf,layers=0-2@512", {}, "layer 2 has no KV cache");
    refused("asrkf,pool=512,score_layers=9", {}, "the model has 2 layers");
    options no_flash;
    no_flash.flash = false;
    refused("asrkf,pool=512", no_flash, "pass flash_attn=True");
    options many;
    many.n_seq = 4;
    refused("asrkf,pool=512", many, "pass -np 1");
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

TEST(unserved_operations, "shifts and copies make the next decode fail, until the cache is cleared") {
    llama_context * ctx = make_context("asrkf,pool=512");
    llama_memory_t mem = llama_get_memory(ctx);
    CHECK(!llama_memory_can_shift(mem));
    CHECK(decode(ctx, { 1, 2, 3 }) == 0);
    llama_memory_seq_add(mem, 0, 0, -1, 5);
    CHECK(decode(ctx, { 4 }) != 0);
    CHECK(std::strstr(asrkf_last_error(), "context shift") != nullptr);
    llama_memory_clear(mem, true);
    CHECK(decode(ctx, { 1, 2, 3 }) == 0);
    llama_memory_seq_cp(mem, 0, 1, 0, -1);
    CHECK(decode(ctx, { 4 }) != 0);
    CHECK(std::strstr(asrkf_last_error(), "one sequence") != nullptr);
    llama_free(ctx);
}

TEST(state, "a state is upstream's: what is saved here loads there and the other way round") {
    llama_context * ctx = make_context("asrkf,pool=512");
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
    CHECK(saved(groups).size() == blob.size());
    llama_free(groups);
    llama_context * plain = make_context(nullptr);
    CHECK(llama_state_set_data(plain, blob.data(), blob.size()) == blob.size());
    CHECK(decode(plain, { 9 }) == 0);
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

TEST(damaged_state, "a truncated or damaged state is refused and the sequence stays, or is read; it never crashes") {
    llama_context * ctx = make_context("asrkf,pool=512");
    CHECK(decode(ctx, std::vector<llama_token>(250, 3)) == 0 && decode(ctx, std::vector<llama_token>(250, 4)) == 0 && decode(ctx, std::vector<llama_token>(200, 5)) == 0);
    const auto blob = saved(ctx);
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
        const size_t n_head = std::min<size_t>(damaged.size(), 9000); // counts, positions, the first types and sizes
        damaged[random() % n_head] ^= uint8_t(1 + random() % 255);
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
