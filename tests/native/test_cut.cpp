// Cuts (refreekv): the rule alone, the attention that it is measured by, and both in a context of the tiny model.
#include "tiny.h"

#include "policy/occasions.h"
#include "scoring/attention_row.h"
#include "scoring/query_ring.h"
#include "store/row_mover.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

using namespace asrkf;

//
// the rule
//

namespace {

using row = std::vector<float>; // [head][token]

// Attention of so many heads, each with a few heavy tokens.
row some_row(std::mt19937 & random, uint32_t n_heads, uint32_t n_tokens) {
    std::normal_distribution<float> normal(0, 2.5f);
    row weights;
    for (uint32_t h = 0; h < n_heads; ++h) {
        std::vector<float> own(n_tokens);
        double sum = 0;
        for (float & w : own) {
            sum += double(w = std::exp(normal(random)));
        }
        for (const float w : own) {
            weights.push_back(float(double(w) / sum));
        }
    }
    return weights;
}

// The published rule, from its formula: for every cut all norms anew.
uint32_t published_cut(const row & weights, uint32_t n_heads, uint32_t n_tokens, uint32_t sinks, double tolerance) {
    const auto mean_norm = [&](uint32_t from) {
        double mean = 0;
        for (uint32_t h = 0; h < n_heads; ++h) {
            double sum = 0;
            for (uint32_t t = from; t < n_tokens; ++t) {
                sum += std::pow(double(weights[h*n_tokens + t]), 2);
            }
            mean += std::sqrt(sum) / n_heads;
        }
        return mean;
    };
    uint32_t k = 0;
    for (uint32_t more = 1; sinks + more < n_tokens; ++more) { // the last token stays
        if ((mean_norm(sinks) - mean_norm(sinks + more)) / mean_norm(sinks) <= tolerance) {
            k = more;
        }
    }
    return k;
}

policy_params cutting(uint32_t pool_cells, const char * settings) {
    return make_policy_params(config_parse(std::string("refreekv") + settings), pool_cells);
}

// A policy with a ranking of its own and tokens 0, 1, ..., n - 1.
struct one_group {
    one_group(const policy_params & p, uint32_t n) : ranks(p.ema, p.interval), rule(p) {
        rule.follow(ranks);
        for (uint32_t i = 0; i < n; ++i) {
            ranks.insert(i, int32_t(i));
            rule.insert(i);
        }
    }
    int32_t end() const { return int32_t(rule.n_tokens()); }
    cut_result cut(const row & weights) {
        norm_cut measured = rule.cut_before(end());
        measured.add_layer(weights, rule.n_tokens());
        cut_result result;
        rule.commit(rule.decide_cut(measured, end(), result));
        return result;
    }
    uint32_t first_active_after_sinks() const {
        uint32_t i = rule.params.sinks;
        while (i < rule.n_tokens() && rule.is_frozen(i)) {
            i++;
        }
        return i;
    }

    ranking ranks;
    policy  rule;
};

} // namespace

TEST(published, "the cut is that of the paper's formula, at every tolerance") {
    std::mt19937 random(7);
    for (const uint32_t n_tokens : { 6u, 40u, 300u }) {
        for (const char * tolerance : { "0", "0.005", "0.01", "0.05", "0.3", "1" }) {
            const row weights = some_row(random, 3, n_tokens);
            one_group g(cutting(512, (std::string(",tolerance=") + tolerance).c_str()), n_tokens);
            const cut_result r = g.cut(weights);
            const uint32_t k = published_cut(weights, 3, n_tokens, 4, double(g.rule.params.tolerance));
            CHECK(r.n_tokens == n_tokens && r.n_kept == n_tokens - k && r.n_wanted == r.n_kept);
            CHECK(g.first_active_after_sinks() == 4 + k && g.rule.n_frozen() == k); // one span, the oldest
        }
    }
}

TEST(short_prompts, "of one to five tokens all stay; a sixth may lose its oldest") {
    std::mt19937 random(11);
    for (uint32_t n = 1; n <= 5; ++n) {
        one_group g(cutting(512, ",tolerance=1"), n);
        CHECK(g.cut(some_row(random, 2, n)).n_kept == n && g.rule.n_frozen() == 0);
    }
    one_group g(cutting(512, ",tolerance=1"), 6);
    CHECK(g.cut(some_row(random, 2, 6)).n_kept == 5 && g.rule.is_frozen(4) && !g.rule.is_frozen(5));
}

TEST(no_tolerance, "without tolerance only tokens without any weight go, and a row of nothing but sinks frees the rest") {
    const uint32_t n = 50;
    row weights(2*n, 0.0f);
    for (uint32_t h = 0; h < 2; ++h) {
        weights[h*n + 0] = 0.5f; // a sink
        for (uint32_t t = 20 + h; t < n; ++t) {
            weights[h*n + t] = 1e-20f;
        }
    }
    one_group g(cutting(512, ",tolerance=0"), n);
    CHECK(g.cut(weights).n_kept == 4 + 30 && g.first_active_after_sinks() == 20);
    row sinks_only(n, 0.0f);
    sinks_only[1] = 1;
    one_group other(cutting(512, ",tolerance=0"), n);
    CHECK(other.cut(sinks_only).n_kept == 5);
    row broken(n, std::nanf(""));
    one_group kept(cutting(512, ",tolerance=0.5"), n);
    CHECK(kept.cut(broken).n_kept == n);
}

TEST(monotone, "a larger tolerance never keeps more; sinks and the last token always stay, and sinks do not count") {
    std::mt19937 random(3);
    for (int round = 0; round < 20; ++round) {
        const uint32_t n = 30 + random() % 200;
        row weights = some_row(random, 4, n);
        uint32_t before = n, at_one_percent = 0;
        for (const float tolerance : { 0.0f, 0.001f, 0.01f, 0.1f, 0.5f, 1.0f }) {
            policy_params p = cutting(512, "");
            p.tolerance = tolerance;
            one_group g(p, n);
            const uint32_t kept = g.cut(weights).n_kept;
            CHECK(kept <= before && kept >= 5);
            CHECK(!g.rule.is_frozen(0) && !g.rule.is_frozen(3) && !g.rule.is_frozen(n - 1));
            before = kept;
            at_one_percent = tolerance == 0.01f ? kept : at_one_percent;
        }
        CHECK(before == 5); // all that may go
        for (uint32_t h = 0; h < 4; ++h) {
            weights[h*n + 2] += 5; // a sink, far heavier than all others
        }
        one_group g(cutting(512, ",tolerance=0.01"), n);
        CHECK(g.cut(weights).n_kept == at_one_percent);
    }
}

TEST(shared_set, "layers that share a set go by the mean of their losses, whatever their norms") {
    std::mt19937 random(5);
    const uint32_t n = 120;
    const row a = some_row(random, 2, n), b = some_row(random, 3, n);
    row larger = a;
    std::transform(larger.begin(), larger.end(), larger.begin(), [](float w) { return 8*w; });
    const auto kept = [&](const row & first, const row & second) {
        norm_cut measured({ 4, 5, 6, 7, 8, 9, 10, 50, 60, 70, 80, 90 }, { 119 });
        measured.add_layer(first, n);
        measured.add_layer(second, n);
        return measured.largest(0.05f);
    };
    CHECK(kept(a, b) == kept(larger, b) && kept(a, b) == kept(b, a));
    norm_cut one({ 4, 5, 6, 7, 8, 9, 10, 50, 60, 70, 80, 90 }, { 119 }), twice = one;
    one.add_layer(a, n);
    twice.add_layer(a, n);
    twice.add_layer(a, n);
    CHECK(one.largest(0.05f) == twice.largest(0.05f));
}

TEST(bound, "a pool that cannot hold what the rule wants keeps the newest of it, and what it wanted is known") {
    std::mt19937 random(9);
    const uint32_t n = 400;
    row even(n, 1.0f / float(n)); // nothing may go
    one_group g(cutting(256, ",tolerance=0.001"), n);
    const cut_result r = g.cut(even);
    CHECK(r.n_tokens == n && r.n_wanted == n && r.n_kept == 256 - 8); // the next interval has room
    CHECK(g.rule.n_active() == r.n_kept && !g.rule.is_frozen(n - 1) && !g.rule.is_frozen(0));
    CHECK(g.first_active_after_sinks() == n - (r.n_kept - 4));
}

TEST(second_cut, "a later cut brings back what it wants; pinned tokens stay, and what a request froze is not the rule's") {
    const uint32_t n = 100;
    row newest(n, 0.0f), all(n, 1.0f / float(n));
    newest[n - 1] = 1;
    one_group g(cutting(512, ",tolerance=0.01"), n);
    g.ranks.set_pinned(50, true);
    CHECK(g.cut(newest).n_kept == 4 + 1 + 1 && !g.rule.is_frozen(50));
    g.rule.set_frozen(30, true, true);
    CHECK(g.cut(all).n_kept == n - 2 && g.rule.is_frozen(4)); // one in a hundred is less than a hundredth of the norm
    CHECK(g.rule.is_frozen(30) && !g.rule.is_frozen(29) && !g.rule.is_frozen(99));
    g.rule.set_frozen(30, false, false);
    CHECK(g.cut(newest).n_kept == 6);
    const plan p = g.rule.decide(1, int32_t(n));
    CHECK(p.freeze.empty() && p.restore.empty()); // room alone brings nothing back
}

TEST(recovered, "what a cut has frozen a window reset brings back, though a step does not") {
    const uint32_t n = 100;
    row newest(n, 0.0f);
    newest[n - 1] = 1;
    one_group g(cutting(512, ",recovery=window"), n);
    CHECK(g.cut(newest).n_kept == 5);
    CHECK(!g.rule.decide(1, int32_t(n)).decided);
    const plan p = g.rule.decide(1, int32_t(n), occasion::window_reset);
    CHECK(p.restore.size() == n - 5 && p.restore[0].why == cause::recovery && p.freeze.empty());
}

TEST(by_relevance, "in the order of relevance the lowest scores go first") {
    const uint32_t n = 60;
    std::mt19937 random(13);
    one_group g(cutting(512, ",tolerance=0.2,order=relevance"), n);
    CHECK(g.rule.params.wants_scores() && !cutting(512, "").wants_scores());
    const row weights = some_row(random, 1, n);
    for (uint32_t i = 0; i < n; ++i) {
        g.ranks.observe(i, weights[i], weights[i], 0);
    }
    const cut_result r = g.cut(weights);
    one_group by_position(cutting(512, ",tolerance=0.2"), n);
    CHECK(r.n_kept < by_position.cut(weights).n_kept); // what has no weight goes, wherever it is
    float lowest_kept = 1, highest_gone = 0;
    for (uint32_t i = 4; i + 1 < n; ++i) {
        (g.rule.is_frozen(i) ? highest_gone : lowest_kept) = g.rule.is_frozen(i) ? std::max(highest_gone, weights[i]) : std::min(lowest_kept, weights[i]);
    }
    CHECK(highest_gone <= lowest_kept && highest_gone > 0);
}

TEST(times, "a cut is due where a prompt ends, read in pieces or not, and every `repeat` tokens after that") {
    cut_times t;
    CHECK(t.is_due({ 512, 1, true }, 0));
    CHECK(!t.is_due({ 1, 1, true }, 0));   // a token of the answer
    CHECK(!t.is_due({ 512, 0, false }, 0));
    CHECK(t.is_due({ 1, 1, true }, 0));    // the prompt's last token came alone
    CHECK(!t.is_due({ 20, 20, true }, 0)); // outputs for all: not known to be a prompt
    cut_times repeated;
    CHECK(repeated.is_due({ 100, 1, true }, 10));
    int n_cuts = 0;
    for (int i = 0; i < 100; ++i) {
        n_cuts += repeated.is_due({ 1, 1, true }, 10);
    }
    CHECK(n_cuts == 10);
}

//
// the attention
//

namespace {

struct keys_fixture {
    keys_fixture(ggml_type type, int64_t n_elements, int64_t n_cells) : row_bytes(ggml_row_size(type, n_elements)) {
        holder.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        keys = ggml_new_tensor_3d(holder.get(), type, n_elements, n_cells / 2, 2); // of two streams
        buffer.reset(ggml_backend_alloc_ctx_tensors(holder.get(), cpu.get()));
    }
    ggml_backend_ptr        cpu { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    ggml_context_ptr        holder;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           keys;
    const size_t            row_bytes;
};

// Writes one query into row 1 of the ring with a graph as the model's would be.
void keep_query(attention_rows & rows, ggml_backend_t cpu, const std::vector<float> & query, int64_t head, int64_t n_head, float scale) {
    ggml_context_ptr holder(ggml_init({ 32*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_tensor * q = ggml_new_tensor_3d(holder.get(), GGML_TYPE_F32, head, n_head, 3);
    const attention_rows::branch b = rows.new_branch(holder.get(), 1);
    ggml_cgraph * graph = ggml_new_graph(holder.get());
    rows.build(holder.get(), graph, b, 0, q, scale);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(holder.get(), cpu));
    std::vector<float> three(size_t(ggml_nelements(q)), 7.0f); // of three tokens, of which the second is kept
    std::copy(query.begin(), query.end(), three.begin() + std::ptrdiff_t(query.size()));
    const int32_t token = 1;
    const int64_t ring_row = 1;
    ggml_backend_tensor_set(q, three.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(b.queries, &token, 0, sizeof(token));
    ggml_backend_tensor_set(b.query_rows, &ring_row, 0, sizeof(ring_row));
    CHECK(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS);
}

// Softmax of one query over the keys as they are stored, by its formula.
std::vector<double> plain_attention(const std::vector<float> & query, const std::vector<std::vector<float>> & keys, int64_t head, int64_t n_head, int64_t n_head_kv, double scale,
        double soft_cap, const std::vector<float> & sinks) {
    std::vector<double> all;
    for (int64_t h = 0; h < n_head; ++h) {
        std::vector<double> own;
        double sum = sinks.empty() ? 0 : std::exp(double(sinks[size_t(h)]));
        for (const std::vector<float> & key : keys) {
            double dot = 0;
            for (int64_t d = 0; d < head; ++d) {
                dot += double(query[size_t(h*head + d)])*double(key[size_t(h/(n_head/n_head_kv)*head + d)]);
            }
            own.push_back(std::exp(soft_cap > 0 ? soft_cap*std::tanh(dot*scale/soft_cap) : dot*scale));
            sum += own.back();
        }
        for (const double w : own) {
            all.push_back(w / sum);
        }
    }
    return all;
}

void check_attention(ggml_type type, float soft_cap, bool has_sinks, uint32_t n_tokens, uint32_t seed) {
    constexpr int64_t head = 64, n_head = 4, n_head_kv = 2;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    keys_fixture at(type, head*n_head_kv, 2*n_tokens);
    std::vector<float> sinks;
    for (int h = 0; has_sinks && h < n_head; ++h) {
        sinks.push_back(2 + normal(random));
    }
    attention_rows rows({ { { 0, head, n_head, n_head_kv, ggml_backend_cpu_buffer_type() }, type, sinks } }, 2, soft_cap, false);
    rows.attach({ at.cpu.get() });
    std::vector<float> query(head*n_head);
    std::generate(query.begin(), query.end(), [&] { return normal(random); });
    keep_query(rows, at.cpu.get(), query, head, n_head, 0.125f);

    std::vector<std::vector<float>>   stored;
    std::vector<std::vector<uint8_t>> hosts(n_tokens, std::vector<uint8_t>(at.row_bytes));
    std::vector<key_place> mixed, on_device;
    std::vector<int32_t>   cells(2*n_tokens);
    std::iota(cells.begin(), cells.end(), 0);
    std::shuffle(cells.begin(), cells.end(), random);
    for (uint32_t t = 0; t < n_tokens; ++t) {
        std::vector<float> key(head*n_head_kv);
        std::generate(key.begin(), key.end(), [&] { return normal(random); });
        ggml_quantize_chunk(type, key.data(), hosts[t].data(), 0, 1, head*n_head_kv, nullptr);
        ggml_get_type_traits(type)->to_float(hosts[t].data(), key.data(), head*n_head_kv);
        stored.push_back(key);
        ggml_backend_tensor_set(at.keys, hosts[t].data(), size_t(cells[t])*at.row_bytes, at.row_bytes);
        on_device.push_back({ cells[t], nullptr });
        mixed.push_back(random() % 3 ? on_device.back() : key_place { -1, hosts[t].data() });
    }
    const std::vector<double> expected = plain_attention(query, stored, head, n_head, n_head_kv, 0.125, double(soft_cap), sinks);
    for (const std::vector<key_place> & places : { on_device, mixed }) {
        std::vector<float> found;
        rows.probabilities(0, 1, at.keys, places, found);
        CHECK(found.size() == expected.size());
        double worst = 0;
        for (size_t i = 0; i < found.size(); ++i) {
            worst = std::max(worst, std::fabs(double(found[i]) - expected[i]));
        }
        CHECK(worst < 2e-6);
    }
}

} // namespace

TEST(attention, "a query's attention over pool and host is one softmax, for every kind of key, in pieces or not") {
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        check_attention(type, 0, false, 3, 1);
        check_attention(type, 0, false, 2*ROW_PIECE_TOKENS + 77, 2);
    }
    check_attention(GGML_TYPE_F16, 5, false, 200, 3);
    check_attention(GGML_TYPE_F16, 0, true, 200, 4);
    check_attention(GGML_TYPE_BF16, 30, true, 600, 5);
}

TEST(ring, "a sequence's ring holds its newest queries, and forgets those that were taken back") {
    query_ring ring(3, 6);
    std::vector<int32_t> tokens;
    std::vector<int64_t> rows;
    ring.keep({ 0, 1, 2, 3, 4 }, tokens, rows);
    CHECK((tokens == std::vector<int32_t>{ 2, 3, 4 }) && (rows == std::vector<int64_t>{ 6, 7, 8 }));
    ring.keep({ 5 }, tokens, rows);
    CHECK(tokens.back() == 0 && rows.back() == 6);
    ring.forget_from(4);
    CHECK(ring.all().size() == 1 && ring.all()[0].pos == 3 && ring.all()[0].row == 7);
}

//
// a context
//

namespace {

constexpr uint32_t N_CTX = 2048;

std::vector<llama_token> some_tokens(uint32_t n, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<llama_token> tokens(n);
    std::generate(tokens.begin(), tokens.end(), [&] { return llama_token(random() % 251); });
    return tokens;
}

uint32_t n_frozen_of(llama_context * ctx, uint32_t group, int32_t seq = 0) {
    const std::vector<uint8_t> states = states_of(ctx, seq, group);
    return uint32_t(std::count(states.begin(), states.end(), uint8_t(ASRKF_TOKEN_FROZEN)));
}

// Frozen is one span behind the sinks, where the order is that of positions.
bool is_one_span(const std::vector<uint8_t> & states) {
    size_t end = 4;
    while (end < states.size() && states[end] == ASRKF_TOKEN_FROZEN) {
        end++;
    }
    return std::none_of(states.begin() + std::ptrdiff_t(end), states.end(), [](uint8_t s) { return s == ASRKF_TOKEN_FROZEN; });
}

using owned = std::unique_ptr<llama_context, void (*)(llama_context *)>;

owned context_of(const std::string & policy, uint32_t n_batch = 512) {
    owned ctx(make_context(policy.c_str(), N_CTX, n_batch), llama_free);
    CHECK(ctx != nullptr);
    if (!ctx) {
        std::printf("%s: %s\n", policy.c_str(), asrkf_last_error());
        std::exit(1);
    }
    return ctx;
}

} // namespace

TEST(prompt, "where a prompt ends each layer is cut, in a pool that holds all too; what is said of it adds up") {
    for (const char * moves : { "direct", "staged" }) {
        owned ctx = context_of(std::string("refreekv,pool=1.0,tolerance=0.2,moves=") + moves);
        CHECK(decode(ctx.get(), some_tokens(400, 1)) == 0);
        const asrkf_stats s = stats_of(ctx.get());
        CHECK(s.n_groups == 2 && s.cuts_total == 1 && s.freezes_total > 0);
        double kept = 0;
        uint32_t enough = 0;
        for (uint32_t ig = 0; ig < 2; ++ig) {
            const uint32_t n_frozen = n_frozen_of(ctx.get(), ig);
            const asrkf_group_stats g = group_of(ctx.get(), ig);
            CHECK(is_one_span(states_of(ctx.get(), 0, ig)) && n_frozen < 395);
            CHECK(std::fabs(g.kept_ratio - float(400 - n_frozen)/400) < 1e-6f && g.wanted_ratio == g.kept_ratio);
            kept  += double(g.kept_ratio) / 2;
            enough = std::max(enough, (400 - n_frozen + 8 + 255)/256*256);
        }
        CHECK(std::fabs(double(s.kept_ratio) - kept) < 1e-6 && s.enough_cells == enough);
        CHECK(n_frozen_of(ctx.get(), 0) + n_frozen_of(ctx.get(), 1) == s.freezes_total);
        for (int i = 0; i < 20; ++i) {
            CHECK(decode(ctx.get(), { 5 }) == 0);
        }
        CHECK(stats_of(ctx.get()).cuts_total == 1 && stats_of(ctx.get()).freezes_total == s.freezes_total); // once
        CHECK(n_frozen_of(ctx.get(), 0) + n_frozen_of(ctx.get(), 1) == s.freezes_total);                    // room brings nothing back
    }
}

TEST(pieces, "a prompt in calls, and in other steps, is cut as in one") {
    const std::vector<llama_token> prompt = some_tokens(300, 2);
    const auto frozen_by = [&](uint32_t n_batch, uint32_t n_first) {
        owned ctx = context_of("refreekv,pool=1.0,tolerance=0.2", n_batch);
        if (n_first) {
            llama_batch batch = llama_batch_init(int32_t(n_first), 0, 1); // without any output
            batch.n_tokens = int32_t(n_first);
            for (uint32_t i = 0; i < n_first; ++i) {
                batch.token[i] = prompt[i], batch.pos[i] = int32_t(i), batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0, batch.logits[i] = 0;
            }
            CHECK(llama_decode(ctx.get(), batch) == 0);
            llama_batch_free(batch);
            CHECK(stats_of(ctx.get()).cuts_total == 0);
        }
        CHECK(decode(ctx.get(), { prompt.begin() + n_first, prompt.end() }) == 0);
        CHECK(stats_of(ctx.get()).cuts_total == 1);
        return std::vector<uint32_t> { n_frozen_of(ctx.get(), 0), n_frozen_of(ctx.get(), 1) };
    };
    const std::vector<uint32_t> at_once = frozen_by(512, 0);
    CHECK(at_once[0] + at_once[1] > 0);
    for (const auto & [n_batch, n_first] : { std::pair(512u, 299u), std::pair(512u, 100u), std::pair(300u, 297u) }) {
        const std::vector<uint32_t> other = frozen_by(n_batch, n_first);
        for (size_t ig = 0; ig < 2; ++ig) { // steps of other lengths round otherwise
            CHECK(std::abs(int(other[ig]) - int(at_once[ig])) <= 2);
        }
    }
}

TEST(long_prompt, "past the pool a prompt is read; the best fit is kept within the bound, and the pool that would do is named") {
    owned ctx = context_of("refreekv,pool=512,tolerance=0.01", 256);
    CHECK(decode(ctx.get(), some_tokens(256, 3)) == 0);
    for (int i = 0; i < 5; ++i) {
        CHECK(decode(ctx.get(), some_tokens(250, uint32_t(10 + i))) == 0);
        for (uint32_t ig = 0; ig < 2; ++ig) {
            const asrkf_group_stats g = group_of(ctx.get(), ig);
            CHECK(g.active_cells <= g.pool_cells && g.kept_ratio <= g.wanted_ratio && is_one_span(states_of(ctx.get(), 0, ig)));
        }
    }
    const asrkf_stats s = stats_of(ctx.get());
    CHECK(s.cuts_total == 6 && s.enough_cells > 512 && s.enough_cells <= N_CTX && s.tokens == 1506);
    CHECK(group_of(ctx.get(), 0).wanted_ratio > group_of(ctx.get(), 0).kept_ratio);
}

TEST(comes_back, "a second prompt is cut over all tokens, frozen ones too: with no tolerance all with weight come back") {
    owned ctx = context_of("refreekv,pool=1.0,tolerance=1"); // all that may go goes
    CHECK(decode(ctx.get(), some_tokens(500, 4)) == 0);
    CHECK(n_frozen_of(ctx.get(), 0) == 495 && n_frozen_of(ctx.get(), 1) == 495);
    std::vector<uint8_t> state(llama_state_get_size(ctx.get()));
    CHECK(llama_state_get_data(ctx.get(), state.data(), state.size()) == state.size());
    owned other = context_of("refreekv,pool=1.0,tolerance=0");
    CHECK(llama_state_set_data(other.get(), state.data(), state.size()) == state.size());
    CHECK(decode(other.get(), { 7 }) == 0);
    CHECK(n_frozen_of(other.get(), 0) == 495 && n_frozen_of(other.get(), 1) == 495); // as in the state
    const uint64_t n_back = stats_of(other.get()).restores_refill_total;
    CHECK(decode(other.get(), some_tokens(8, 5)) == 0);
    CHECK(n_frozen_of(other.get(), 0) == 0 && n_frozen_of(other.get(), 1) == 0 && stats_of(other.get()).restores_refill_total == n_back + 2*495);
}

TEST(cut_back, "taking tokens back after a cut leaves the cut; a sequence that is emptied begins anew") {
    owned ctx = context_of("refreekv,pool=1.0,tolerance=0.2");
    CHECK(decode(ctx.get(), some_tokens(400, 6)) == 0);
    const uint32_t n_frozen = n_frozen_of(ctx.get(), 0);
    for (int i = 0; i < 10; ++i) {
        CHECK(decode(ctx.get(), { 9 }) == 0);
    }
    llama_memory_t mem = llama_get_memory(ctx.get());
    CHECK(llama_memory_seq_rm(mem, 0, 402, -1) && decode(ctx.get(), { 3 }) == 0);
    CHECK(n_frozen_of(ctx.get(), 0) == n_frozen && stats_of(ctx.get()).cuts_total == 1);
    CHECK(llama_memory_seq_rm(mem, 0, 200, -1) && decode(ctx.get(), { 3 }) == 0); // into the prompt: the new last tokens must be there
    CHECK(states_of(ctx.get(), 0).back() != ASRKF_TOKEN_FROZEN);
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1) && decode(ctx.get(), some_tokens(400, 6)) == 0);
    CHECK(n_frozen_of(ctx.get(), 0) == n_frozen && stats_of(ctx.get()).cuts_total == 2);
}

TEST(repeated, "while tokens are generated a cut may be repeated") {
    owned ctx = context_of("refreekv,pool=1.0,tolerance=0.3,repeat=16");
    CHECK(decode(ctx.get(), some_tokens(200, 7)) == 0);
    for (int i = 0; i < 64; ++i) {
        CHECK(decode(ctx.get(), some_tokens(1, uint32_t(i))) == 0);
    }
    CHECK(stats_of(ctx.get()).cuts_total == 5);
}

TEST(own_cuts, "sequences are cut each by its own attention, in one batch or not, in one pool or in streams") {
    for (const bool unified : { true, false }) {
        CHECK(next_policy("refreekv,pool=1.0,tolerance=0.2"));
        llama_context_params params = llama_context_default_params();
        params.n_ctx = 2*N_CTX, params.n_batch = params.n_ubatch = 512, params.n_seq_max = 2, params.kv_unified = unified;
        params.n_threads = params.n_threads_batch = 1;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        owned both(llama_init_from_model(load_model(), params), llama_free);
        CHECK(both != nullptr);
        const std::vector<llama_token> prompts[2] = { some_tokens(200, 21), some_tokens(200, 22) };
        llama_batch batch = llama_batch_init(400, 0, 1);
        for (int32_t i = 0; i < 400; ++i) {
            batch.token[i] = prompts[i / 200][size_t(i % 200)], batch.pos[i] = i % 200, batch.n_seq_id[i] = 1, batch.seq_id[i][0] = i / 200;
            batch.logits[i] = i % 200 == 199;
        }
        batch.n_tokens = 400;
        CHECK(llama_decode(both.get(), batch) == 0 && stats_of(both.get()).cuts_total == 2);
        llama_batch_free(batch);
        for (int seq = 0; seq < 2; ++seq) {
            owned alone = context_of("refreekv,pool=1.0,tolerance=0.2");
            CHECK(decode(alone.get(), prompts[seq]) == 0);
            for (uint32_t ig = 0; ig < 2; ++ig) {
                CHECK(std::abs(int(n_frozen_of(both.get(), ig, seq)) - int(n_frozen_of(alone.get(), ig))) <= 2);
                CHECK(n_frozen_of(alone.get(), ig) > 0);
            }
        }
    }
}

TEST(refused_cut, "where the host has no room, or a move fails, nothing is cut, all stays active, and that is said") {
    owned ctx = context_of("refreekv,pool=1.0,tolerance=0.5,host_limit=4kB");
    CHECK(decode(ctx.get(), some_tokens(400, 8)) == 0);
    CHECK(asrkf_last_status() == ASRKF_HOST_LIMIT && std::strstr(asrkf_last_error(), "sequence 0 was cut in part or not at all"));
    CHECK(stats_of(ctx.get()).cuts_total == 0 && n_frozen_of(ctx.get(), 0) == 0);
    CHECK(decode(ctx.get(), { 1 }) == 0);
    owned other = context_of("refreekv,pool=1.0,tolerance=0.5");
    fail_move_in = 1;
    CHECK(decode(other.get(), some_tokens(400, 8)) == 0);
    fail_move_in = 0;
    CHECK(asrkf_last_status() == ASRKF_MOVE_FAILED && stats_of(other.get()).cuts_total == 0 && n_frozen_of(other.get(), 0) == 0);
    CHECK(decode(other.get(), { 1 }) == 0);
}

TEST(no_cuts, "other policies keep no queries for cuts, and make none") {
    owned ctx = context_of("window,pool=512");
    CHECK(decode(ctx.get(), some_tokens(400, 1)) == 0);
    const asrkf_stats s = stats_of(ctx.get());
    CHECK(s.cuts_total == 0 && s.kept_ratio == -1 && s.enough_cells == 0 && s.device_index_bytes == 0);
}

int main() { return run_all_tests(); }
