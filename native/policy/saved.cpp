// What a policy knows, as bytes of a saved state.
#include "policy/policy.h"

#include <cmath>
#include <cstring>

namespace asrkf {

namespace {

// As they lie in memory: a state is read by what wrote it, or refused by its sizes.
struct saved_head  { uint32_t token_bytes, n_tokens, decision, tokens_since_decide, tokens_since_score, tokens_of_score; };
struct saved_token { float score, peak; uint32_t flags, count, wake, grace, frozen_at, recalled_at; };
constexpr uint32_t SAVED_OBSERVED = 1, SAVED_FROZEN = 2, SAVED_HELD = 4;

} // namespace

std::vector<uint8_t> policy::save() const {
    const saved_head head = { sizeof(saved_token), n_tokens(), decision, tokens_since_decide, tokens_since_score, tokens_of_score };
    std::vector<uint8_t> bytes(sizeof(head) + tokens.size()*sizeof(saved_token));
    std::memcpy(bytes.data(), &head, sizeof(head));
    uint8_t * to = bytes.data() + sizeof(head);
    for (const token & t : tokens) {
        const uint32_t flags = (t.observed ? SAVED_OBSERVED : 0) | (t.frozen && !t.returns ? SAVED_FROZEN : 0) | (t.held ? SAVED_HELD : 0);
        const saved_token s = { t.score, t.peak, flags, t.count, t.wake, t.grace, t.frozen_at, t.recalled_at };
        std::memcpy(to, &s, sizeof(s));
        to += sizeof(s);
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
    if (!fits(bytes, n_tokens())) {
        throw error(ASRKF_INVALID_ARGUMENT, "the scores and timers of a state are not those of its tokens");
    }
    saved_head head;
    std::memcpy(&head, bytes.data(), sizeof(head));
    decision            = head.decision;
    tokens_since_decide = head.tokens_since_decide;
    tokens_since_score  = head.tokens_since_score;
    tokens_of_score     = std::max(1u, head.tokens_of_score);
    for (uint32_t i = 0; i < n_tokens(); ++i) {
        token & t = tokens[i];
        saved_token s;
        std::memcpy(&s, bytes.data() + sizeof(head) + i*sizeof(s), sizeof(s));
        t.observed    = (s.flags & SAVED_OBSERVED) && std::isfinite(s.score) && std::isfinite(s.peak);
        t.score       = t.observed ? s.score : 0;
        t.peak        = t.observed ? s.peak : 0;
        t.held        = t.frozen && (s.flags & SAVED_FROZEN) && (s.flags & SAVED_HELD);
        t.returns     = t.frozen && !(s.flags & SAVED_FROZEN);
        t.count       = s.count;
        t.wake        = s.wake;
        t.grace       = s.grace;
        t.frozen_at   = s.frozen_at;
        t.recalled_at = s.recalled_at;
    }
    returning = protection_changed = true;
}

} // namespace asrkf
