// What the output rows of the last llama_decode() say of the next token.
#pragma once

#include "scoring/output_reader.h"

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

struct llama_context;
struct llama_ubatch;
class llm_graph_result;

namespace asrkf {

// The last output row of each sequence that the host has no logits of: a backend sampler leaves them on the device, in memory that
// the next step uses again (what then lies on the host is an earlier step's). Where the device reads rows more cheaply than the
// host, also those that it has.
class output_rows {
public:
    explicit output_rows(uint32_t n_seq_max) : rows(n_seq_max) {}

    // After each step. is_read: all rows are, not only those that a sampler takes. Never throws: where a row could not be read the
    // thread's last error says why.
    void fetch(llama_context & ctx, const llm_graph_result & res, const llama_ubatch & ubatch, bool is_read);
    // Since the last clear(): none: ask the host; plain: it has the row, too; lost: a sampler's that could not be read.
    enum class row { none, plain, sampled, lost };
    row at(uint32_t seq) const { return rows[seq].kind; }
    // Of a plain or sampled one: waits for it. Throws error(ASRKF_INTERNAL) if the device failed.
    asrkf_output of(uint32_t seq) { return rows[seq].reader->of(seq); }
    void clear() { rows.assign(rows.size(), {}); }

private:
    output_reader & reader_of(ggml_backend_t backend);

    struct kept { row kind = row::none; output_reader * reader = nullptr; };
    std::vector<kept> rows; // by sequence
    std::map<ggml_backend_dev_t, std::unique_ptr<output_reader>> readers; // a batch of another size may be computed elsewhere
};

// Copies rows to the host.
std::unique_ptr<output_reader> make_host_reader(uint32_t n_slots);
// Makes the n-th of its reads from now on in this thread fail, for tests; 0: none.
extern thread_local uint32_t fail_output_in;

// Does a backend sampler take any of the step's outputs?
bool goes_to_sampler(const llm_graph_result & res);
// Of the step's first output row, which nobody has read yet: waits for it.
double first_entropy(llama_context & ctx, const llm_graph_result & res);

} // namespace asrkf
