// Two contexts in two threads of one process. Built with ASRKF_SANITIZE=thread, ThreadSanitizer watches our sources
// (scripts/test_native thread).
#include "tiny.h"

#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

// Both threads are here, or none goes on.
class meeting_point {
public:
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        const unsigned now = round;
        if (++n_waiting == 2) {
            n_waiting = 0;
            round++;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return round != now; });
        }
    }

private:
    std::mutex              mutex;
    std::condition_variable changed;
    unsigned                n_waiting = 0, round = 0;
};

template <typename Body> void in_two_threads(Body body) {
    std::thread a([&] { body(0); }), b([&] { body(1); });
    a.join();
    b.join();
}

// What a thread saw; CHECK counts without a lock, so the main thread judges it.
struct run {
    std::vector<float> logits; // of every step
    asrkf_stats        stats = {};
    bool               ok    = false;
};

// A prompt and single tokens, past the pool; every call may fail.
run decode_past_the_pool(const char * policy, int first_token) {
    run result;
    llama_context * ctx = make_context(policy, 2048, 128);
    if (!ctx) {
        return result;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(load_model()));
    result.ok = true;
    for (int i = 0; i < 100; ++i) {
        std::vector<llama_token> tokens(i < 8 ? 100 : 1);
        for (size_t t = 0; t < tokens.size(); ++t) {
            tokens[t] = llama_token((first_token + 7*i + 31*int(t)) % n_vocab);
        }
        result.ok = result.ok && decode(ctx, tokens) == 0;
        const float * logits = result.ok ? llama_get_logits_ith(ctx, -1) : nullptr;
        result.ok = result.ok && logits;
        if (logits) {
            result.logits.insert(result.logits.end(), logits, logits + n_vocab);
        }
    }
    uint64_t n = 0;
    result.ok = result.ok && asrkf_freeze(ctx, 0, 100, 120, &n) == ASRKF_OK && asrkf_pin(ctx, 0, 200, 210) == ASRKF_OK;
    result.stats.struct_size = sizeof(result.stats);
    result.ok = result.ok && asrkf_get_stats(ctx, &result.stats) == ASRKF_OK;
    llama_free(ctx);
    return result;
}

} // namespace

TEST(same_bits, "contexts in two threads, each past its pool, compute the bits that each computes alone") {
    load_model();
    struct pair { const char * policies[2]; };
    for (const pair & p : { pair { { "asrkf,pool=512", "window,pool=256,window=64" } },
                            pair { { "asrkf,layers=0@256/1@512,window=64,moves=staged,recovery=full", "asrkf,pool=256,window=64,recall=mean_key,recovery=second_look" } },
                            pair { { "paper,pool=512,tau=0.5", "paper,pool=512,tau=0.5" } } }) {
        run alone[2], together[2];
        for (int i = 0; i < 2; ++i) {
            alone[i] = decode_past_the_pool(p.policies[i], i);
        }
        in_two_threads([&](int i) { together[i] = decode_past_the_pool(p.policies[i], i); });
        for (int i = 0; i < 2; ++i) {
            CHECK(alone[i].ok && together[i].ok);
            CHECK(alone[i].stats.tokens == 892 && alone[i].stats.frozen_cells > 0);
            CHECK(alone[i].logits.size() == together[i].logits.size() &&
                std::memcmp(alone[i].logits.data(), together[i].logits.data(), alone[i].logits.size()*sizeof(float)) == 0);
            CHECK(alone[i].stats.freezes_total == together[i].stats.freezes_total && alone[i].stats.decisions_total == together[i].stats.decisions_total);
        }
    }
}

TEST(own_settings, "asrkf_next_context() is for this thread's next context, whatever other threads create before it") {
    load_model();
    meeting_point meet;
    int32_t policies[2] = { -1, -1 };
    in_two_threads([&](int i) {
        asrkf_config config;
        config.struct_size = sizeof(config);
        if (i == 0) { // sets, and creates last
            asrkf_config_parse("asrkf,pool=512", &config);
            asrkf_next_context(&config);
            meet.wait();
            meet.wait();
        } else {
            meet.wait();
        }
        llama_context * ctx = make_context(nullptr, 1024, 64);
        asrkf_stats stats;
        stats.struct_size = sizeof(stats);
        if (ctx && asrkf_get_stats(ctx, &stats) == ASRKF_OK) {
            policies[i] = stats.policy;
        }
        llama_free(ctx);
        if (i == 1) {
            meet.wait();
        }
    });
    CHECK(policies[0] == ASRKF_POLICY_ASRKF && policies[1] == ASRKF_POLICY_FULL);
}

TEST(own_errors, "asrkf_last_error() is of this thread's last failure") {
    load_model();
    meeting_point meet;
    std::string texts[2][2];
    asrkf_status status[2][2] = {};
    in_two_threads([&](int i) {
        const auto look = [&](int when) {
            texts[i][when]  = asrkf_last_error();
            status[i][when] = asrkf_last_status();
        };
        if (i == 0) {
            asrkf_config config;
            config.struct_size = sizeof(config);
            asrkf_config_parse("asrkf,pool=-1", &config);
        }
        meet.wait();
        look(0);
        meet.wait();
        if (i == 1) {
            llama_free(make_context("asrkf,pool=4096", 1024, 64)); // refused: free(NULL)
        }
        meet.wait();
        look(1);
    });
    CHECK(texts[0][0].find("pool=-1") != std::string::npos && status[0][0] == ASRKF_INVALID_ARGUMENT);
    CHECK(texts[1][0].empty() && status[1][0] == ASRKF_OK);
    CHECK(texts[0][1] == texts[0][0] && status[0][1] == status[0][0]);
    CHECK(texts[1][1].find("larger than n_ctx 1024") != std::string::npos);
}

TEST(errors_at_once, "of two threads that fail all the time, each reads its own text every time") {
    int n_own[2] = { 0, 0 };
    in_two_threads([&](int i) { // without a meeting point: a text that is shared is a race
        asrkf_config config;
        config.struct_size = sizeof(config);
        for (int n = 0; n < 2000; ++n) {
            asrkf_config_parse(i ? "asrkf,pool=-1" : "asrkf,interval=0", &config);
            n_own[i] += std::strstr(asrkf_last_error(), i ? "pool=-1" : "interval=0") != nullptr;
        }
    });
    CHECK(n_own[0] == 2000 && n_own[1] == 2000);
}

int main() {
    llama_backend_init();
    const int failed = run_all_tests();
    llama_model_free(load_model());
    llama_backend_free();
    return failed;
}
