// The second look under llama_decode, on a two-layer model: what the token's second time computes, what is left of its first,
// and what becomes of a look that fails.
#include "tiny.h"

#include "scoring/device_scorers.h"
#include "store/row_mover.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

using asrkf::fail_move_in;
using asrkf::fail_scoring_in;

namespace {

constexpr uint32_t N_CTX = 2048, N_PROMPT = 900;
const std::string POOL = "asrkf,pool=512,window=64,layers=shared,rewalk_tokens=0";
const std::string LOOK = POOL + ",recovery=second_look,look_share=0.25";

struct free_context { void operator()(llama_context * ctx) const { llama_free(ctx); } };
using context = std::unique_ptr<llama_context, free_context>;

llama_token some_token(uint32_t i) { return llama_token((i*7919u + 13u) % 251u); }

int read_prompt(llama_context * ctx) {
    std::vector<llama_token> prompt;
    for (uint32_t i = 0; i < N_PROMPT; ++i) {
        prompt.push_back(some_token(i));
    }
    int status = 0;
    for (uint32_t i = 0; i < N_PROMPT && status == 0; i += 300) {
        status = decode(ctx, { prompt.begin() + i, prompt.begin() + i + 300 });
    }
    return status;
}

context with_prompt(const std::string & policy) {
    context ctx(make_context(policy.c_str(), N_CTX, 512));
    CHECK(ctx && read_prompt(ctx.get()) == 0);
    return ctx;
}

int step(llama_context * ctx, uint32_t i) { return decode(ctx, { some_token(N_PROMPT + i) }); }

std::vector<float> logits_of(llama_context * ctx) {
    const float * logits = llama_get_logits_ith(ctx, -1);
    CHECK(logits != nullptr);
    return logits ? std::vector<float>(logits, logits + 256) : std::vector<float>();
}

// K and V of one token in F16, as numbers.
std::vector<float> row_of(llama_context * ctx, int32_t pos) {
    std::vector<ggml_fp16_t> row(group_of(ctx, 0).token_bytes / sizeof(ggml_fp16_t));
    CHECK(get_rows(ctx, 0, pos, row.data(), row.size()*sizeof(ggml_fp16_t)) == ASRKF_OK);
    std::vector<float> values;
    for (const ggml_fp16_t x : row) {
        values.push_back(ggml_fp16_to_fp32(x));
    }
    return values;
}

float difference(const std::vector<float> & a, const std::vector<float> & b) {
    CHECK(a.size() == b.size());
    float most = 0;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        most = std::max(most, std::fabs(a[i] - b[i]));
    }
    return most;
}

float largest(const std::vector<float> & a) { return difference(a, std::vector<float>(a.size())); }

std::vector<uint8_t> saved(llama_context * ctx) {
    std::vector<uint8_t> blob(llama_state_seq_get_size(ctx, 0));
    CHECK(llama_state_seq_get_data(ctx, blob.data(), blob.size(), 0) == blob.size());
    return blob;
}

// Logits and row of a token on rows that were saved before it, with the same tokens frozen: a pool that holds everything, and
// all others frozen by request.
struct oracle {
    oracle(const std::vector<uint8_t> & before, const std::vector<uint8_t> & states, uint32_t i) : ctx(make_context("asrkf,pool=2048,window=16", N_CTX, 512)) {
        llama_context * c = ctx.get();
        CHECK(llama_state_seq_set_data(c, before.data(), before.size(), 0) == before.size());
        CHECK(asrkf_restore(c, 0, 0, -1, nullptr) == ASRKF_OK);
        for (size_t p = 0; p < states.size(); ++p) {
            CHECK(states[p] != ASRKF_TOKEN_FROZEN || asrkf_freeze(c, 0, int32_t(p), int32_t(p) + 1, nullptr) == ASRKF_OK);
        }
        CHECK(step(c, i) == 0);
        const std::vector<uint8_t> now = states_of(c);
        for (size_t p = 0; p < states.size(); ++p) {
            CHECK((now[p] == ASRKF_TOKEN_FROZEN) == (states[p] == ASRKF_TOKEN_FROZEN));
        }
        logits = logits_of(c);
        row    = row_of(c, int32_t(states.size()) - 1);
    }

    context            ctx;
    std::vector<float> logits, row;
};

uint64_t n_looks(llama_context * ctx) { return stats_of(ctx).second_looks_total; }

// Steps until one is looked at again, and the rows before that one. Returns which.
uint32_t next_look(llama_context * ctx, uint32_t i, std::vector<uint8_t> & before, llama_context * beside = nullptr) {
    for (; i < 600; ++i) {
        before = saved(ctx);
        const uint64_t n_before = n_looks(ctx);
        CHECK(step(ctx, i) == 0 && (!beside || step(beside, i) == 0));
        if (n_looks(ctx) > n_before) {
            CHECK(n_looks(ctx) == n_before + 1);
            return i;
        }
    }
    CHECK(false);
    return i;
}

} // namespace

TEST(second_time, "the token that is looked at again has the logits and rows of one computed with these tokens active, and nothing of its first time") {
    context ctx = with_prompt(LOOK + ",state=upstream"), without = with_prompt(POOL + ",state=upstream");
    std::vector<uint8_t> before;
    uint32_t i = 0;
    for (int n = 0; n < 3; ++n) {
        i = next_look(ctx.get(), i, before, n == 0 ? without.get() : nullptr);
        const oracle o(before, states_of(ctx.get()), i);
        const int32_t pos = int32_t(N_PROMPT + i);
        const std::vector<float> logits = logits_of(ctx.get()), row = row_of(ctx.get(), pos);
        CHECK(difference(logits, o.logits) < 1e-3f*largest(logits) && difference(row, o.row) < 1e-3f*largest(row)); // cells lie in another order
        if (n == 0) { // up to here both did the same, so this is what its first time was
            CHECK(difference(logits, logits_of(without.get())) > 20*difference(logits, o.logits));
            CHECK(difference(row, row_of(without.get(), pos)) > 20*difference(row, o.row));
        }
        i++;
    }
    const asrkf_stats s = stats_of(ctx.get());
    CHECK(s.second_looks_total == 3 && s.restores_recovery_total > 0 && s.tokens == N_PROMPT + i && s.active_cells <= 512);
}

TEST(no_look, "a token that is not looked at again is computed as without second looks, bit for bit, and other steps have none") {
    context plain = with_prompt(POOL), never = with_prompt(LOOK + ",look_share=0");
    for (uint32_t i = 0; i < 100; ++i) {
        CHECK(step(plain.get(), i) == 0 && step(never.get(), i) == 0);
        CHECK(logits_of(plain.get()) == logits_of(never.get()) && states_of(plain.get()) == states_of(never.get()));
    }
    CHECK(n_looks(never.get()) == 0 && stats_of(never.get()).scoring_steps_total > stats_of(plain.get()).scoring_steps_total + 80);

    context pairs = with_prompt(LOOK + ",look_share=0.5");
    for (uint32_t i = 0; i < 200; i += 2) {
        CHECK(decode(pairs.get(), { some_token(i), some_token(i + 1) }) == 0);
    }
    CHECK(n_looks(pairs.get()) == 0);

    context whole(make_context("asrkf,pool=2048,recovery=second_look,look_share=0.5", N_CTX, 512)); // nothing is frozen
    CHECK(read_prompt(whole.get()) == 0);
    for (uint32_t i = 0; i < 100; ++i) {
        CHECK(step(whole.get(), i) == 0);
    }
    CHECK(n_looks(whole.get()) == 0 && stats_of(whole.get()).scoring_steps_total == 0);
}

TEST(bounded, "there are never more looks than the share of the tokens, whatever starts them; a run repeats") {
    for (const char * trigger : { "missed", "random" }) {
        context ctx = with_prompt(LOOK + ",look_trigger=" + trigger);
        std::vector<std::vector<float>> first;
        const uint64_t n_scored = stats_of(ctx.get()).scoring_steps_total;
        for (uint32_t i = 0; i < 200; ++i) {
            CHECK(step(ctx.get(), i) == 0);
            CHECK(n_looks(ctx.get()) <= (i + 1)/4);
            first.push_back(logits_of(ctx.get()));
        }
        const asrkf_stats s = stats_of(ctx.get());
        CHECK(s.second_looks_total > 10 && s.scoring_steps_total >= n_scored + 200);
        CHECK(s.tokens == N_PROMPT + 200 && s.active_cells <= 512);
        CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, -1, -1)); // all of it: the next text is a run of its own
        CHECK(read_prompt(ctx.get()) == 0);
        bool same = true;
        for (uint32_t i = 0; i < 200; ++i) {
            CHECK(step(ctx.get(), i) == 0);
            same = same && logits_of(ctx.get()) == first[i];
        }
        CHECK(same && n_looks(ctx.get()) == 2*s.second_looks_total);
    }
}

TEST(several, "a step of several sequences has no look; one of a single sequence among several has") {
    CHECK(next_policy((LOOK + ",pool=1024").c_str()));
    llama_context_params params = llama_context_default_params();
    params.n_ctx     = N_CTX;
    params.n_batch   = params.n_ubatch = 512;
    params.n_seq_max = 2;
    params.kv_unified = true;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    context ctx(llama_init_from_model(load_model(), params));
    CHECK(ctx != nullptr);
    llama_pos end[2] = { 0, 0 };
    const auto extend = [&](std::vector<llama_seq_id> seqs, int n) {
        llama_batch batch = llama_batch_init(512, 0, 1);
        for (const llama_seq_id seq : seqs) {
            for (int i = 0; i < n; ++i, ++batch.n_tokens) {
                batch.token[batch.n_tokens]     = some_token(uint32_t(end[seq] + 31*seq));
                batch.pos[batch.n_tokens]       = end[seq]++;
                batch.n_seq_id[batch.n_tokens]  = 1;
                batch.seq_id[batch.n_tokens][0] = seq;
                batch.logits[batch.n_tokens]    = i + 1 == n;
            }
        }
        const int status = llama_decode(ctx.get(), batch);
        llama_batch_free(batch);
        return status;
    };
    for (int i = 0; i < 3; ++i) {
        CHECK(extend({ 0 }, 250) == 0 && extend({ 1 }, 250) == 0);
    }
    CHECK(stats_of(ctx.get()).frozen_cells > 0);
    for (int i = 0; i < 80; ++i) {
        CHECK(extend({ 0, 1 }, 1) == 0);
    }
    CHECK(n_looks(ctx.get()) == 0);
    for (int i = 0; i < 80; ++i) {
        CHECK(extend({ 1 }, 1) == 0);
    }
    CHECK(n_looks(ctx.get()) > 0);
}

static bool abort_in_look(void * data) {
    auto * ctx = static_cast<llama_context **>(data);
    return *ctx && n_looks(*ctx) == 1;
}

TEST(failures, "a look that fails takes its token back, says why, and the token can come again; without scores there is none") {
    std::vector<uint8_t> before;
    const uint32_t i = next_look(with_prompt(LOOK + ",moves=staged").get(), 0, before);
    const auto up_to_look = [&] {
        context ctx = with_prompt(LOOK + ",moves=staged");
        for (uint32_t n = 0; n < i; ++n) {
            CHECK(step(ctx.get(), n) == 0);
        }
        CHECK(n_looks(ctx.get()) == 0);
        return ctx;
    };
    int n_refused = 0;
    for (uint32_t nth = 1; nth < 4; ++nth) { // copies of the step's own decision, if there are any, then those of the look
        context ctx = up_to_look();
        asrkf_clear_error();
        fail_move_in = nth;
        const int status = step(ctx.get(), i);
        CHECK(fail_move_in != 0 || (status < 0 && std::strstr(asrkf_last_error(), "this move was to fail") != nullptr));
        n_refused += status < 0 && fail_move_in == 0;
        fail_move_in = 0;
        CHECK(stats_of(ctx.get()).tokens == N_PROMPT + i + (status == 0));
        CHECK((status == 0 || step(ctx.get(), i) == 0) && stats_of(ctx.get()).tokens == N_PROMPT + i + 1);
        CHECK(step(ctx.get(), i + 1) == 0 && stats_of(ctx.get()).active_cells <= 512);
    }
    CHECK(n_refused > 0);
    context aborted = up_to_look();
    llama_context * watched = aborted.get();
    llama_set_abort_callback(aborted.get(), abort_in_look, &watched);
    CHECK(step(aborted.get(), i) < 0 && stats_of(aborted.get()).tokens == N_PROMPT + i);
    watched = nullptr;
    CHECK(step(aborted.get(), i) == 0 && stats_of(aborted.get()).tokens == N_PROMPT + i + 1);

    context blind = up_to_look();
    fail_scoring_in = 1;
    CHECK(step(blind.get(), i) == 0 && n_looks(blind.get()) == 0 && std::strstr(asrkf_last_error(), "failed to compute a step's scores") != nullptr);
    fail_scoring_in = 0;
}

TEST(cut_back, "tokens that were looked at again can be taken back, and a state saved after a look goes on as its run did") {
    context ctx = with_prompt(LOOK);
    std::vector<uint8_t> before;
    const uint32_t i = next_look(ctx.get(), 0, before);
    const int32_t pos = int32_t(N_PROMPT + i);
    const std::vector<float> row = row_of(ctx.get(), pos);
    const std::vector<uint8_t> after = saved(ctx.get());
    context other(make_context(LOOK.c_str(), N_CTX, 512)), third(make_context(LOOK.c_str(), N_CTX, 512));
    for (llama_context * c : { other.get(), third.get() }) {
        CHECK(llama_state_seq_set_data(c, after.data(), after.size(), 0) == after.size());
        CHECK(row_of(c, pos) == row);
    }
    for (uint32_t n = i + 1; n < i + 150; ++n) { // two that were loaded alike, looks and all
        CHECK(step(other.get(), n) == 0 && step(third.get(), n) == 0 && logits_of(other.get()) == logits_of(third.get()));
    }
    CHECK(n_looks(other.get()) == n_looks(third.get()) && n_looks(other.get()) > 5);
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, pos - 3, -1) && stats_of(ctx.get()).tokens == N_PROMPT + i - 3);
    for (uint32_t n = i - 3; n < i + 100; ++n) {
        CHECK(step(ctx.get(), n) == 0);
    }
    CHECK(n_looks(ctx.get()) > 5 && stats_of(ctx.get()).active_cells <= 512);
}

int main() { return run_all_tests(); }
