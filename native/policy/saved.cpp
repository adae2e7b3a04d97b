// What a policy and its ranking know, as bytes of a saved state: each group's are whole, with the scores that all share.
#include "policy/policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace asrkf {

namespace {

// As they lie in memory: a state is read by what wrote it, or refused by its sizes.
struct saved_head  { uint32_t token_bytes, n_tokens, decision, tokens_since_decide, tokens_since_score, tokens_of_score; };
struct saved_token { float score, peak, lean; uint32_t flags, count, wake, grace, frozen_at, recalled_at; };
constexpr uint32_t SAVED_OBSERVED = 1, SAVED_FROZEN = 2, SAVED_HELD = 4;

saved_head head_of(const std::vector<uint8_t> & bytes, uint32_t n_tokens) {
    if (!policy::fits(bytes, n_tokens)) {
        throw error(ASRKF_INVALID_ARGUMENT, "the scores and timers of a state are not those of its tokens");
    }
    saved_head head;
    std::memcpy(&head, bytes.data(), sizeof(head));
    return head;
}

saved_token token_of(const std::vector<uint8_t> & bytes, uint32_t i) {
    saved_token s;
    std::memcpy(&s, bytes.data() + sizeof(saved_head) + i*sizeof(s), sizeof(s));
    return s;
}

bool is_seen(const saved_token & s) { return (s.flags & SAVED_OBSERVED) && std::isfinite(s.score) && std::isfinite(s.peak); }

} // namespace

std::vector<uint8_t> policy::save() const {
    const saved_head head = { sizeof(saved_token), n_tokens(), decision, tokens_since_decide, ranks->tokens_since_score, ranks->tokens_of_score };
    std::vector<uint8_t> bytes(sizeof(head) + n_tokens()*sizeof(saved_token));
    std::memcpy(bytes.data(), &head, sizeof(head));
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const float   score  = has_own_scores() ? histories[i].score : ranks->score(i);
        const bool    frozen = is_frozen(i), seen = score != ranking::UNSEEN;
        const history past   = has_timers() ? histories[i] : history();
        const uint32_t at    = since[i] || frozen ? decision - std::min(decision, age(i)) : 0;
        const saved_token s  = { seen ? score : 0, ranks->peak(i), params.leans ? leans[i] : 1,
            (seen ? SAVED_OBSERVED : 0) | (frozen && !returns.has(i) ? SAVED_FROZEN : 0) | (held.has(i) ? SAVED_HELD : 0),
            past.count, frozen ? past.until : 0, frozen ? 0 : past.until, frozen ? at : 0, frozen ? 0 : at };
        std::memcpy(bytes.data() + sizeof(head) + i*sizeof(s), &s, sizeof(s));
    }
    return bytes;
}

bool policy::fits(const std::vector<uint8_t> & bytes, uint32_t n_tokens) {
    saved_head head = {};
    if (bytes.size() >= sizeof(head)) {
        std::memcpy(&head, bytes.data(), sizeof(head));
    }
    return head.token_bytes == sizeof(saved_token) && head.n_tokens == n_tokens && bytes.size() == sizeof(head) + n_tokens*sizeof(saved_token);
}

void policy::load(const std::vector<uint8_t> & bytes) {
    const saved_head head = head_of(bytes, n_tokens());
    decision            = head.decision;
    tokens_since_decide = head.tokens_since_decide;
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const saved_token s = token_of(bytes, i);
        const bool frozen = is_frozen(i), was_frozen = s.flags & SAVED_FROZEN;
        held.put(i, frozen && was_frozen && s.flags & SAVED_HELD);
        returns.put(i, frozen && !was_frozen);
        since[i] = uint16_t(frozen ? s.frozen_at : s.recalled_at);
        if (params.leans) {
            leans[i] = std::isfinite(s.lean) ? std::clamp(s.lean, 1 / MOST_LEAN, MOST_LEAN) : 1;
        }
        if (has_histories()) {
            histories[i] = { is_seen(s) ? s.score : ranking::UNSEEN, s.count, frozen ? was_frozen ? s.wake : decision : s.grace };
        }
    }
    waiting_stale = returning = protection_changed = true;
}

void ranking::load(const std::vector<uint8_t> & bytes) {
    const saved_head head = head_of(bytes, n_tokens());
    tokens_since_score = head.tokens_since_score;
    tokens_of_score    = std::max(1u, head.tokens_of_score);
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        const saved_token s = token_of(bytes, i);
        scores[i] = is_seen(s) ? s.score : UNSEEN;
        peaks[i]  = is_seen(s) ? s.peak : 0;
    }
    surveyed = false;
}

} // namespace asrkf
