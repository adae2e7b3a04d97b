// States: upstream's own format, complete, wherever the rows are; before it, unless state=upstream says otherwise, what the
// policies know (saved_policies.h).
#pragma once

#include "llama/saved_policies.h"
#include "llama/sequence_ops.h"

namespace asrkf {

class saved_states {
public:
    saved_states(const settings & config, layer_groups & groups, token_table & tokens, scores & scored, sequence_ops & sequences)
        : config(config), groups(groups), tokens(tokens), scored(scored), sequences(sequences) {}

    // Of one sequence, or of all (seq_id < 0). Throw error; a state that cannot be read leaves the context as it was.
    void write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const;
    void read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags);

private:
    struct arrival { llama_pos pos; uint32_t at; std::vector<uint32_t> users; }; // a token as it comes, and the number it came as
    using slots_by_group = std::vector<std::vector<uint32_t>>;

    void check(llama_seq_id seq_id, llama_state_seq_flags flags) const;
    const std::string & model_name() const;
    std::vector<saved_sequence> policies_of(llama_seq_id seq_id) const;
    std::vector<uint32_t> records_of(llama_seq_id seq_id, uint32_t stream) const;
    void write_users(llama_io_write_i & io, llama_seq_id seq_id, const std::vector<uint32_t> & ids) const;
    void write_rows (llama_io_write_i & io, const row_part & part, const std::vector<uint32_t> & ids, bool through_host) const;

    void    read_stream(llama_io_read_i & io, llama_seq_id seq_id, std::vector<arrival> & arrivals, slots_by_group & slots) const;
    arrival read_token (llama_io_read_i & io, llama_seq_id seq_id, uint32_t at) const;
    void    read_rows  (llama_io_read_i & io, uint32_t first, uint32_t n, const slots_by_group & slots) const;
    void    check_fit(llama_seq_id seq_id, const std::vector<arrival> & arrivals, std::vector<saved_sequence> & saved) const;
    void    replace  (llama_seq_id seq_id, const std::vector<arrival> & arrivals, const std::vector<saved_sequence> & saved, slots_by_group & slots);
    void    take_pins(const saved_sequence & s);

    const settings &    config;
    layer_groups &      groups;
    token_table &       tokens;
    scores &            scored;
    sequence_ops &      sequences;
    mutable std::string own_name; // made when a state first needs it
};

} // namespace asrkf
