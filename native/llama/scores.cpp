#include "llama/scores.h"

#include "llama/creation.h"
#include "llama/refusal.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace asrkf {

// As choose_scored() has them: one sequence, as many as may be, and a prompt's end.
std::vector<scoring_shape> largest_shapes(const settings & config) {
    const uint32_t n_seqs = std::min(config.n_seq_max, std::max(1u, PROMPT_END_QUERIES / config.score_queries));
    std::vector<scoring_shape> shapes = { { 0, config.score_queries, false, false } };
    if (n_seqs > 1) {
        shapes.push_back({ 0, n_seqs*config.score_queries, false, true });
    }
    if (config.recovery == RECOVERY_SECOND_LOOK) {
        shapes.push_back({ 0, 1, false, false });
    }
    if (config.rewalk_tokens >= 2 && make_policy_params(config, 1).recall) {
        shapes.push_back({ 0, PROMPT_END_QUERIES, true, false });
    }
    return shapes;
}

std::unique_ptr<relevance> make_scorer(const settings & config, const std::vector<uint32_t> & scoring_layers, const group_of_layer & group_of, std::vector<uint32_t> & sets, bool no_alloc) {
    std::vector<scoring_layer> layers;
    for (const uint32_t il : scoring_layers) {
        const uint32_t ig = group_of(il);
        const auto set = std::find(sets.begin(), sets.end(), ig);
        layers.push_back({ attention_of(config, il), uint32_t(set - sets.begin()) });
        if (set == sets.end()) {
            sets.push_back(ig);
        }
    }
    return std::make_unique<relevance>(layers, config.n_index_rows(), config.index_tokens_per_row(), config.n_ring_rows(), config.index_type(), score_kind(config.score),
            logit_soft_cap(config.model), no_alloc);
}

scores::scores(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, counters & counted,
        const std::vector<uint32_t> & scoring_layers, ggml_backend_buffer_type_t buft, ggml_type type_k)
    : gated(config, groups, tokens, moves, buft), own(config, groups, tokens, moves, type_k), config(config), groups(groups), tokens(tokens), moves(moves), counted(counted) {
    if (scoring_layers.empty()) {
        return;
    }
    scorer = make_scorer(config, scoring_layers, [&](uint32_t il) { return groups.of_layer(il); }, sets, config.no_alloc);
    devices = std::make_unique<device_scorers>(*scorer, largest_shapes(config), config.no_alloc);
    for (const std::string & note : devices->notes()) {
        if (!config.no_alloc) {
            LLAMA_LOG_WARN("asrkf: %s\n", note.c_str());
        }
    }
    arrived.reset(ggml_backend_buft_alloc_buffer(buft, (scorer->n_heads() + devices->size()*2*config.n_index_rows())*sizeof(float)));
    if (!arrived) {
        throw error(ASRKF_INTERNAL, "no host memory for the scores");
    }
}

void scores::prepare(side_step & step, const std::vector<part> & parts, bool prompt_end) {
    if (!scorer) {
        return;
    }
    devices->before_writes();
    step.shape = worst_shape(uint32_t(step.records.size())); // so that it changes with the number of tokens only
    for (const part & p : parts) {
        std::vector<llama_pos> step_pos;
        for (const uint32_t i : p.tokens) {
            step_pos.push_back(tokens.records[step.records[i]].pos);
        }
        std::vector<int32_t> kept;
        tokens.sequences[p.seq].rings.keep(step_pos, kept, step.query_rows);
        for (const int32_t i : kept) {
            step.queries.push_back(int32_t(p.tokens[size_t(i)]));
        }
    }
    step.shape.n_kept = uint32_t(step.queries.size());
    step.written      = scorer->written_by(step.shape, *tokens.index, step.records);
    prepare_scoring(step.scoring, prompt_end ? askers::prompt_end : askers::of_steps);
    prepare_scoring(step.look, askers::newest);
    own.prepare(step, parts);
}

branch_shape scores::worst_shape(uint32_t n_tokens) const {
    branch_shape shape;
    shape.n_tokens  = n_tokens;
    shape.n_written = config.index_tokens_per_row() == 1 ? n_tokens : scorer->n_written(n_tokens) + 2*(std::min(n_tokens, config.n_seq_max) - 1);
    shape.n_kept    = std::min(n_tokens, config.n_seq_max)*query_rings::n_kept(n_tokens, config.score_queries);
    return shape;
}

std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> scores::breakdown() const {
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> sizes = gated.breakdown();
    for (const auto & own_sizes : { own.kept_bytes(), own.room_bytes() }) {
        sizes.insert(sizes.end(), own_sizes.begin(), own_sizes.end());
    }
    if (scorer) {
        const auto computing = devices->breakdown();
        sizes.insert(sizes.end(), computing.begin(), computing.end());
        sizes.insert(sizes.end(), scorer->breakdown().begin(), scorer->breakdown().end());
    }
    return sizes;
}

int scores::place_of(int32_t il) const {
    for (size_t i = 0; scorer && i < scorer->layers().size(); ++i) {
        if (scorer->layers()[i].il == uint32_t(il)) {
            return int(i);
        }
    }
    return -1;
}

// Of the sequences that score: rows of their rings, what each query sees, and the graph.
void scores::prepare_scoring(scoring_job & job, askers who) {
    if (job.seqs.empty()) {
        return;
    }
    job.who = who;
    scoring_inputs & in = prepared(job);
    in.scoring.clear();
    for (const uint32_t seq : job.seqs) {
        const std::vector<int32_t> own = tokens.sequences[seq].rings.scoring_rows(who);
        in.scoring.insert(in.scoring.end(), own.begin(), own.end());
    }
    job.shape = { devices->size_class(tokens.index->n_used()), uint32_t(in.scoring.size()), who == askers::prompt_end, job.seqs.size() > 1 };
    note_frozen(job);
    std::vector<scoring_query> queries;
    for (const uint32_t seq : job.seqs) {
        sequence & s = tokens.sequences[seq];
        for (const int32_t pos : s.rings.positions(who)) {
            queries.push_back({ &s.seen, groups.ranks_of(seq).lower_bound(int64_t(pos) + 1) });
        }
    }
    scorer->write_mask(job.shape, queries, in.mask);
    attach();
    devices->prepare(job.shape);
}

void scores::note_frozen(const scoring_job & job) {
    std::vector<const seen_rows *> seen;
    for (const uint32_t seq : job.seqs) {
        sequence & s = tokens.sequences[seq];
        std::vector<const uint64_t *> active;
        for (const uint32_t set : sets) {
            active.push_back(groups[set].rules[seq].active_tokens().data());
        }
        s.seen.update(*tokens.index, s.records, active);
        seen.push_back(&s.seen);
    }
    if (scorer->kind == SCORE_ATTENTION) {
        seen_rows::write_frozen(seen, sets.size(), job.shape.n_scored, prepared(job).frozen);
    }
}

void scores::attach() {
    if (!devices->is_attached()) {
        devices->attach(moves.backends());
    }
}

// llama.cpp calls this where nothing may throw: all is made by now.
void scores::set_input(const side_step & step, const relevance::branch & branch) {
    const auto set = [](ggml_tensor * t, const auto & values) {
        if (t) {
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
    };
    scorer->set_written(branch, step.written);
    set(branch.queries, step.queries);
    set(branch.query_rows, step.query_rows);
}

void scores::run(const scoring_job & job) {
    if (job.seqs.empty()) {
        return;
    }
    std::swap(running, prepared(job));
    n_arrived = job.shape.n_scored;
    auto * out_missed = static_cast<float *>(ggml_backend_buffer_get_base(arrived.get()));
    try {
        pending = job.seqs;
        counted.scoring_steps_total++;
        devices->prepare(job.shape); // again: another may have been since, and this one is kept
        devices->run(running, out_missed + scorer->n_heads(), out_missed);
        if (job.who != askers::newest) {
            own.run();
        }
    } catch (const std::exception & e) {
        give_up(e);
    }
}

// Whether the scores that are pending have come.
bool scores::await() {
    try {
        devices->wait();
        return true;
    } catch (const std::exception & e) {
        give_up(e);
        return false;
    }
}

void scores::give_up(const std::exception & why) {
    counted.scoring_steps_total -= !pending.empty();
    pending.clear();
    own.drop_pending();
    refuse(format("the device failed to compute a step's scores: its policy goes by the last ones (%s)", text_of(why).c_str()), ASRKF_INTERNAL);
}

void scores::read_missed() {
    const auto * by_head = static_cast<const float *>(ggml_backend_buffer_get_base(arrived.get()));
    if (scorer->kind == SCORE_ATTENTION) {
        newest_missed = { std::accumulate(by_head, by_head + scorer->n_heads(), 0.0f) / float(scorer->n_heads()),
            *std::max_element(by_head, by_head + scorer->n_heads()) };
    }
}

scores::missed_attention scores::wait_for_missed() {
    stopwatch watch(counted.scoring_seconds);
    if (pending.empty() || !await()) {
        return {};
    }
    read_missed();
    return newest_missed;
}

void scores::fold_in() {
    gated.fold_in();
    if (pending.empty()) {
        return;
    }
    stopwatch watch(counted.scoring_seconds);
    if (!await()) {
        return;
    }
    read_missed();
    auto * means = static_cast<float *>(ggml_backend_buffer_get_base(arrived.get())) + scorer->n_heads();
    float * peaks = means + n_arrived;
    for (size_t p = 1; p < devices->size(); ++p) { // of other devices
        for (uint32_t row = 0; row < n_arrived; ++row) {
            means[row] += means[2*p*n_arrived + row];
            peaks[row]  = std::max(peaks[row], peaks[2*p*n_arrived + row]);
        }
    }
    const float n_scored = float(pending.size());
    for (const uint32_t seq : pending) {
        const sequence & s = tokens.sequences[seq];
        ranking & ranks = groups.ranks_of(seq);
        const float keep = ranks.average_weight();
        const auto give = [&](auto & to, uint32_t i) {
            const uint32_t row = (*tokens.index)[s.records[i]];
            if (row < n_arrived) { // a token of this very call may be newer
                const float share = n_scored / float(tokens.index->tokens_of(row));
                to.observe(i, means[row]*share, peaks[row]*share, keep);
            }
        };
        for (uint32_t i = 0; i < s.n_tokens(); ++i) { // once, for all groups
            give(ranks, i);
        }
        for (group & g : groups) {
            policy & rule = g.rules[seq];
            for (uint32_t w = 0; rule.has_own_scores() && w < rule.active_tokens().n_words(); ++w) {
                token_set::each(w, rule.active_tokens().word(w), [&](uint32_t i) { give(rule, i); });
            }
        }
    }
    pending.clear();
    own.fold_in();
}

void scores::index_records(const std::vector<uint32_t> & ids) {
    if (!scorer || ids.empty()) {
        return;
    }
    await(); // it reads the rows that are about to be written
    std::vector<std::vector<uint32_t>> members(tokens.index->n_used()); // of the index rows that change
    std::vector<bool> changed(members.size(), false);
    for (const uint32_t id : ids) {
        changed[(*tokens.index)[id]] = true;
    }
    for (uint32_t id = 0; id < tokens.records.size(); ++id) {
        if (tokens.records[id].users.any() && changed[(*tokens.index)[id]]) {
            members[(*tokens.index)[id]].push_back(id);
        }
    }
    for (size_t i = 0; i < scorer->layers().size(); ++i) {
        index_layer(i, members);
    }
}

// members: the records of each index row that changes.
void scores::index_layer(size_t i, const std::vector<std::vector<uint32_t>> & members) {
    const ggml_type type = config.index_type();
    const scoring_layer & l = scorer->layers()[i];
    const auto parts = groups.row_parts();
    const ggml_tensor * k = groups[groups.of_layer(l.il)].cache->k_of(l.il);
    const row_part & part = *std::find_if(parts.begin(), parts.end(), [&](const row_part & p) { return p.tensor == k; });
    const size_t key_bytes = ggml_row_size(type, l.head);
    std::vector<uint8_t> run, stored(part.row_bytes);
    std::vector<float>   values(size_t(k->ne[0])), sum;
    for (uint32_t begin = 0, end; begin < members.size(); begin = end) { // rows that follow each other go in one transfer
        for (end = begin; end < members.size() && end - begin < POOL_PAD_CELLS && !members[end].empty(); ++end) {}
        run.resize((end - begin)*key_bytes*size_t(l.n_head_kv));
        for (uint32_t row = begin; row < end; ++row) {
            sum.assign(values.size(), 0);
            for (const uint32_t id : members[row]) {
                moves.read(part, id, stored.data());
                if (k->type == GGML_TYPE_F32) {
                    std::memcpy(values.data(), stored.data(), part.row_bytes);
                } else {
                    ggml_get_type_traits(k->type)->to_float(stored.data(), values.data(), k->ne[0]);
                }
                for (size_t d = 0; d < sum.size(); ++d) {
                    sum[d] += values[d] / float(members[row].size());
                }
            }
            for (size_t h = 0; h < size_t(l.n_head_kv); ++h) {
                ggml_quantize_chunk(type, sum.data() + h*size_t(l.head), run.data() + (h*(end - begin) + row - begin)*key_bytes, 0, 1, l.head, nullptr);
            }
        }
        if (end > begin) {
            scorer->set_rows(i, begin, end - begin, run.data());
        } else {
            ++end;
        }
    }
}

} // namespace asrkf
