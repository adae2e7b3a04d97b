// What every room may know: a failure with its status, text by printf's rules, and the names of choices (the order is that of
// the configuration table, policy/config.cpp). The standard library and asrkf.h only.
#pragma once

#include "asrkf.h"

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace asrkf {

// A failure with the status that the C boundary gives back.
struct error : std::runtime_error {
    error(asrkf_status status, const std::string & text) : std::runtime_error(text), status(status) {}
    asrkf_status status;
};

// What a caller is told of any exception: an error's own text, and what helps where memory has run out.
std::string text_of(const std::exception & e);

// For n more elements of what grows with the context: by an eighth, where a vector by itself takes twice its bytes.
template <typename Vector> void make_room(Vector & values, size_t n = 1) {
    if (values.size() + n > values.capacity()) {
        values.reserve(values.size() + n + values.size() / 8 + 64);
    }
}

std::string format(const char * fmt, ...) __attribute__((format(printf, 1, 2)));

// For tests: what this thread keeps from one step to the next, because it changes little, is made anew each time.
extern thread_local bool makes_anew;

enum score_kind { SCORE_ATTENTION = 0, SCORE_MAGNITUDE, SCORE_RANDOM, SCORE_RECENCY, SCORE_NONE, SCORE_GATE };
enum moves_kind { MOVES_AUTO = 0, MOVES_DIRECT, MOVES_STAGED };
enum state_kind { STATE_OWN = 0, STATE_UPSTREAM };
enum index_kind { INDEX_AUTO = 0, INDEX_F16, INDEX_Q8_0, INDEX_Q4_0 };
enum ranking_kind { RANKING_SHARED = 0, RANKING_OWN };
enum recall_kind { RECALL_OFF = 0, RECALL_EXACT, RECALL_MEAN_KEY };
enum recovery_kind { RECOVERY_OFF = 0, RECOVERY_SOFT, RECOVERY_WINDOW, RECOVERY_FULL, RECOVERY_SECOND_LOOK }; // the first four: the highest level that is used
enum types_kind { TYPES_GIVEN = 0, TYPES_AUTO };
enum order_kind { ORDER_POSITION = 0, ORDER_RELEVANCE };
enum trigger_kind { TRIGGER_ENTROPY = 0, TRIGGER_RANDOM };
enum look_trigger_kind { LOOK_MISSED = 0, LOOK_ENTROPY, LOOK_RANDOM };

} // namespace asrkf
