// The engine with the CUDA kernels as scorer of a real graph: their host code and their source run on the CPU (cuda_shim.h), in a stream
// that does nothing until somebody waits for it, beside the same contexts with the portable graph.
#include "tiny.h"

#include "cuda/copier.h"
#include "cuda/kernels.h"
#include "cuda/outputs.h"
#include "cuda/scorer.h"
#include "scoring/device_scorers.h"

#include <algorithm>
#include <memory>
#include <set>

namespace {

bool wants_cuda = false, wants_copier = false;
const bool added = asrkf::add_scorer_kind({ [](ggml_backend_dev_t) { return wants_cuda; }, asrkf::cuda::make_scorer });
const bool reads = asrkf::add_output_reader_kind({ [](ggml_backend_dev_t) { return wants_cuda; }, asrkf::cuda::make_output_reader });
const bool moves = asrkf::add_row_copier_kind({ [](ggml_backend_dev_t) { return wants_copier; }, asrkf::cuda::make_row_copier });
const bool delays = shim::delays = true;

struct free_context { void operator()(llama_context * ctx) const { llama_free(ctx); } };
using context = std::unique_ptr<llama_context, free_context>;

context make(const char * policy, bool cuda, uint32_t n_seq = 1) {
    CHECK(next_policy(policy));
    llama_context_params params = llama_context_default_params();
    params.n_ctx      = 2048;
    params.n_batch    = params.n_ubatch = 512;
    params.n_seq_max  = n_seq;
    params.kv_unified = true;
    params.n_threads  = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    wants_cuda = cuda;
    context ctx(llama_init_from_model(load_model(), params));
    wants_cuda = false;
    CHECK(ctx && std::string(stats_of(ctx.get()).scoring_backend) == (cuda ? "cuda" : "graph"));
    return ctx;
}

// n tokens more for each of these sequences, in one batch.
int extend(const context & ctx, const std::vector<llama_seq_id> & seqs, int n) {
    llama_batch batch = llama_batch_init(int32_t(seqs.size())*n, 0, 1);
    for (const llama_seq_id seq : seqs) {
        const llama_pos begin = llama_memory_seq_pos_max(llama_get_memory(ctx.get()), seq) + 1;
        for (int i = 0; i < n; ++i) {
            const int at = batch.n_tokens++;
            batch.token[at]     = llama_token((uint32_t(begin + i)*7919u + uint32_t(seq)*104729u) % 251u);
            batch.pos[at]       = begin + i;
            batch.n_seq_id[at]  = 1;
            batch.seq_id[at][0] = seq;
            batch.logits[at]    = i + 1 == n;
        }
    }
    const int status = llama_decode(ctx.get(), batch);
    llama_batch_free(batch);
    return status;
}

// Of all groups: what a sequence has frozen.
std::set<std::pair<uint32_t, int32_t>> frozen_of(const context & ctx, int32_t seq) {
    std::set<std::pair<uint32_t, int32_t>> found;
    for (uint32_t group = 0; group < stats_of(ctx.get()).n_groups; ++group) {
        size_t n = 0;
        CHECK(asrkf_get_tokens(ctx.get(), seq, group, nullptr, nullptr, 0, &n) == ASRKF_OK);
        std::vector<int32_t> pos(n);
        std::vector<uint8_t> state(n);
        CHECK(asrkf_get_tokens(ctx.get(), seq, group, pos.data(), state.data(), n, &n) == ASRKF_OK);
        for (size_t i = 0; i < n; ++i) {
            if (state[i] == ASRKF_TOKEN_FROZEN) {
                found.emplace(group, pos[i]);
            }
        }
    }
    return found;
}

// The part of what is frozen in one or the other that is in both.
double agreement(const context & a, const context & b, int32_t seq) {
    const auto of_a = frozen_of(a, seq), of_b = frozen_of(b, seq);
    size_t n_both = 0;
    for (const auto & token : of_a) {
        n_both += of_b.count(token);
    }
    CHECK(of_a.size() > 100);
    return double(n_both) / double(of_a.size() + of_b.size() - n_both);
}

struct setting { const char * policy; uint32_t n_seq; };

} // namespace

TEST(decisions, "decisions are those of the portable graph, but for ties within its rounding, and so is missed attention") {
    for (const setting & s : { setting { "asrkf,layers=0@512/1@768,window=64,index=f16", 1 }, { "asrkf,pool=512,layers=shared,window=64,rewalk_tokens=32,index=f16", 1 },
            { "asrkf,pool=1024,layers=shared,window=64,index=f16", 2 }, { "asrkf,pool=512,layers=shared,window=64,recall=mean_key,index=f16", 1 },
            { "asrkf,pool=512,layers=shared,window=64,recovery=second_look,look_share=0.25,index=f16", 1 }, { "paper,pool=512,layers=shared,window=64,index=f16", 1 } }) {
        const context cuda = make(s.policy, true, s.n_seq), graph = make(s.policy, false, s.n_seq);
        std::vector<llama_seq_id> seqs;
        for (uint32_t seq = 0; seq < s.n_seq; ++seq) { seqs.push_back(llama_seq_id(seq)); }
        const uint64_t n_launches = shim::n_launches;
        for (const context * ctx : { &cuda, &graph }) {
            for (const llama_seq_id seq : seqs) {
                CHECK(extend(*ctx, { seq }, 512) == 0 && extend(*ctx, { seq }, 188) == 0);
            }
            for (int i = 0; i < 40; ++i) {
                CHECK(extend(*ctx, seqs, 1) == 0);
            }
        }
        CHECK(shim::n_launches > n_launches);
        const asrkf_stats found = stats_of(cuda.get()), wanted = stats_of(graph.get());
        double least = 1;
        for (const llama_seq_id seq : seqs) {
            least = std::min(least, agreement(cuda, graph, seq));
        }
        std::printf("%s: of what is frozen by one or the other, %.4f is by both; missed attention %.5f and %.5f, worst head %.5f and %.5f\n", s.policy, least,
                double(found.missed_attention_ratio), double(wanted.missed_attention_ratio), double(found.missed_attention_worst_ratio), double(wanted.missed_attention_worst_ratio));
        CHECK(least > 0.99);
        CHECK(found.second_looks_total == wanted.second_looks_total && (found.second_looks_total > 0) == (std::string(s.policy).find("second_look") != std::string::npos));
        CHECK(found.scoring_steps_total == wanted.scoring_steps_total && found.scoring_steps_total > 0 && found.decisions_total == wanted.decisions_total);
        CHECK(std::abs(found.missed_attention_ratio - wanted.missed_attention_ratio) < 0.01f);
        CHECK(std::abs(found.missed_attention_worst_ratio - wanted.missed_attention_worst_ratio) < 0.01f);
    }
}

TEST(first_decision, "from the same rows and the same index the first decision freezes the same tokens") {
    const char * policy = "asrkf,pool=512,layers=shared,window=64,rewalk_tokens=0,index=f16";
    const context cuda = make(policy, true), graph = make(policy, false);
    for (const context * ctx : { &cuda, &graph }) {
        CHECK(extend(*ctx, { 0 }, 500) == 0 && extend(*ctx, { 0 }, 200) == 0);
    }
    CHECK(stats_of(cuda.get()).decisions_total == stats_of(graph.get()).decisions_total && stats_of(cuda.get()).freezes_total > 100);
    const double agree = agreement(cuda, graph, 0);
    std::printf("first decision: %.4f\n", agree);
    CHECK(agree > 0.99);
}

TEST(copied, "with rows moved by the kernel the model says the same, bit for bit, as with rows moved by a graph; and needs no staging buffer") {
    const auto logits_of = [](const char * policy, bool copier, bool pins) {
        wants_copier = copier;
        shim::pins   = pins;
        const context ctx = make(policy, true);
        wants_copier = false;
        CHECK(extend(ctx, { 0 }, 512) == 0 && extend(ctx, { 0 }, 188) == 0);
        std::vector<float> all;
        for (int i = 0; i < 40; ++i) {
            CHECK(extend(ctx, { 0 }, 1) == 0);
            const float * logits = llama_get_logits_ith(ctx.get(), -1);
            all.insert(all.end(), logits, logits + 256);
        }
        const asrkf_stats stats = stats_of(ctx.get());
        CHECK(stats.moves_to_host_total > 0 && stats.moves_to_device_total > 0 && (stats.device_staging_bytes == 0) == (copier && pins));
        return all;
    };
    for (const char * policy : { "asrkf,layers=0@512/1@768,window=64,moves=staged", "asrkf,pool=512,layers=shared,window=64,moves=staged,state=upstream" }) {
        const std::vector<float> expected = logits_of(policy, false, true);
        CHECK(logits_of(policy, true, true) == expected);
        CHECK(logits_of(policy, true, false) == expected);
    }
    shim::pins = true;
}

TEST(outputs, "recovery and a caller have the entropies that the host finds, whoever draws the tokens") {
    const auto entropies = [](bool cuda, bool sampled) {
        const context ctx = make("asrkf,pool=512,layers=shared,recovery=soft", cuda, 2);
        std::vector<llama_sampler *> chains; // each serves one sequence
        for (const llama_seq_id seq : { 0, 1 }) {
            chains.push_back(llama_sampler_chain_init(llama_sampler_chain_default_params()));
            llama_sampler_chain_add(chains.back(), llama_sampler_init_greedy());
            CHECK(!sampled || llama_set_sampler(ctx.get(), seq, chains.back()));
        }
        wants_cuda = cuda; // readers are made when the first output comes
        std::vector<double> found;
        for (int i = 0; i < 20; ++i) {
            CHECK(extend(ctx, { 0, 1 }, 2) == 0);
            for (const int32_t row : { -1, -2, 1, 3 }) { // two tokens of the one sequence, then two of the other
                asrkf_output out = { sizeof(asrkf_output), 0, 0, 0 };
                CHECK(asrkf_output_entropy(ctx.get(), row, &out) == ASRKF_OK);
                found.insert(found.end(), { out.log_sum_exp, out.entropy, out.top_probability });
            }
            found.push_back(double(stats_of(ctx.get()).entropy));
        }
        CHECK(stats_of(ctx.get()).outputs_total == 38);
        wants_cuda = false;
        for (const llama_seq_id seq : { 0, 1 }) {
            CHECK(llama_set_sampler(ctx.get(), seq, nullptr));
            llama_sampler_free(chains[size_t(seq)]);
        }
        return found;
    };
    const std::vector<double> expected = entropies(false, false);
    const int64_t n_before = shim::n_alive;
    for (const bool sampled : { false, true }) {
        const uint64_t n_launches = shim::n_launches;
        const std::vector<double> found = entropies(true, sampled);
        CHECK(shim::n_launches >= n_launches + 40 && found.size() == expected.size());
        for (size_t i = 0; i < found.size(); ++i) {
            CHECK(std::abs(found[i] - expected[i]) < 1e-5);
        }
    }
    CHECK(shim::n_alive == n_before && shim::n_left == 0);
}

TEST(lost_outputs, "a read that fails costs that output's entropy where only the device has it, and nothing else") {
    for (const bool sampled : { false, true }) {
        const context ctx = make("asrkf,pool=512,layers=shared,recovery=soft", true);
        llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        CHECK(!sampled || llama_set_sampler(ctx.get(), 0, chain));
        wants_cuda = true;
        CHECK(extend(ctx, { 0 }, 2) == 0);
        int n_faults = 0;
        while (shim::fail_in == 0) { // each call of CUDA's in a step
            shim::fail_in = ++n_faults;
            CHECK(extend(ctx, { 0 }, 1) == 0);
        }
        shim::fail_in = 0;
        CHECK(extend(ctx, { 0 }, 1) == 0 && extend(ctx, { 0 }, 1) == 0);
        const uint64_t n_read = stats_of(ctx.get()).outputs_total, n_outputs = uint64_t(n_faults) + 2;
        std::printf("%s: %llu of %llu outputs were read\n", sampled ? "sampled" : "plain", (unsigned long long) n_read, (unsigned long long) n_outputs);
        CHECK(n_faults >= 5 && (sampled ? n_read >= 2 && n_read < n_outputs : n_read == n_outputs));
        wants_cuda = false;
        CHECK(llama_set_sampler(ctx.get(), 0, nullptr));
        llama_sampler_free(chain);
    }
}

TEST(again, "a seed repeats: the same tokens give the same decisions, to the last one") {
    const char * policy = "asrkf,layers=0@512/1@768,window=64,rewalk_tokens=0";
    const context one = make(policy, true), two = make(policy, true);
    for (const context * ctx : { &one, &two }) {
        CHECK(extend(*ctx, { 0 }, 512) == 0 && extend(*ctx, { 0 }, 188) == 0);
        for (int i = 0; i < 24; ++i) {
            CHECK(extend(*ctx, { 0 }, 1) == 0);
        }
    }
    CHECK(frozen_of(one, 0) == frozen_of(two, 0));
    CHECK(stats_of(one.get()).missed_attention_ratio == stats_of(two.get()).missed_attention_ratio);
}

TEST(cut_short, "scores that nobody waits for harm nothing: a cleared cache, a cut, a shift, a saved state, a context that ends") {
    const int64_t n_before = shim::n_alive;
    {
        const context ctx = make("asrkf,pool=512,layers=shared,window=64,rewalk_tokens=0", true);
        llama_memory_t mem = llama_get_memory(ctx.get());
        for (int round = 0; round < 2; ++round) {
            CHECK(extend(ctx, { 0 }, 512) == 0 && extend(ctx, { 0 }, 188) == 0 && extend(ctx, { 0 }, 8) == 0);
            llama_memory_clear(mem, true); // scores are under way
            CHECK(extend(ctx, { 0 }, 512) == 0 && extend(ctx, { 0 }, 188) == 0 && extend(ctx, { 0 }, 8) == 0);
            CHECK(llama_memory_seq_rm(mem, 0, 100, 140));
            llama_memory_seq_add(mem, 0, 140, -1, -40);
            CHECK(extend(ctx, { 0 }, 8) == 0);
            std::vector<uint8_t> state(llama_state_get_size(ctx.get()));
            CHECK(llama_state_get_data(ctx.get(), state.data(), state.size()) > 0);
            CHECK(extend(ctx, { 0 }, 8) == 0);
            CHECK(llama_state_set_data(ctx.get(), state.data(), state.size()) > 0);
            CHECK(extend(ctx, { 0 }, 8) == 0 && stats_of(ctx.get()).tokens == 684);
            llama_memory_clear(mem, true);
        }
        CHECK(extend(ctx, { 0 }, 512) == 0 && extend(ctx, { 0 }, 188) == 0);
        CHECK(stats_of(ctx.get()).scoring_steps_total > 0);
    }
    CHECK(shim::n_alive == n_before && shim::n_left == 0);
}

TEST(failing, "a call of CUDA's that fails costs the step its scores and says so; the next ones come") {
    const context ctx = make("asrkf,pool=512,layers=shared,window=64,rewalk_tokens=0", true);
    CHECK(extend(ctx, { 0 }, 512) == 0 && extend(ctx, { 0 }, 188) == 0);
    for (int fault = 1; fault < 20; fault += 6) { // each step takes its time here
        const uint64_t scored = stats_of(ctx.get()).scoring_steps_total;
        asrkf_clear_error();
        shim::fail_in = fault;
        int n_refused = 0;
        for (int i = 0; i < 16; ++i) {
            n_refused += extend(ctx, { 0 }, 1) != 0;
        }
        CHECK(shim::fail_in == 0);
        CHECK(n_refused <= 1); // a step that could not be ordered behind the scores is refused, and comes again
        CHECK(std::string(asrkf_last_error()).find("CUDA failed to ") != std::string::npos);
        for (int i = 0; i < 16; ++i) {
            CHECK(extend(ctx, { 0 }, 1) == 0);
        }
        CHECK(stats_of(ctx.get()).scoring_steps_total >= scored + 2);
    }
}

TEST(falls_back, "a card that cannot be used leaves the context with the portable graph") {
    wants_cuda = true;
    shim::fail_in = 3;
    CHECK(next_policy("asrkf,pool=512,layers=shared,window=64"));
    const context ctx(make_context(nullptr, 2048, 512));
    CHECK(shim::fail_in == 0 && ctx && std::string(stats_of(ctx.get()).scoring_backend) == "graph");
    CHECK(extend(ctx, { 0 }, 512) == 0 && extend(ctx, { 0 }, 188) == 0 && stats_of(ctx.get()).scoring_steps_total > 0);
    wants_cuda = false;
    llama_context * plain = make_context("full", 512, 512);
    CHECK(std::string(stats_of(plain).scoring_backend) == "none");
    llama_free(plain);
    llama_context * whole = make_context("asrkf,pool=2048", 2048, 512);
    CHECK(std::string(stats_of(whole).scoring_backend) == "none"); // a pool that holds everything scores nothing
    llama_free(whole);
}

int main() { return run_all_tests(); }
