// What is done to whole sequences: tokens taken away, copied, kept. Frozen tokens are part of the sequence.
#pragma once

#include "llama/scores.h"

namespace asrkf {

class sequence_ops {
public:
    sequence_ops(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, scores & scored)
        : config(config), groups(groups), tokens(tokens), moves(moves), scored(scored) {}

    // Tokens [begin, end), at least one, are no longer the sequence's. keep_store: host arenas stay, also if no token is left.
    void forget(sequence & s, uint32_t begin, uint32_t end, bool keep_store = false);
    void forget_all(sequence & s, bool keep_store = false) {
        if (s.n_tokens() > 0) {
            forget(s, 0, s.n_tokens(), keep_store);
        }
    }
    // A step that was placed and has failed: its rows were never computed, for none of its sequences.
    void undo_step();
    // Positions [p0, p1) of one sequence, or of all (seq_id < 0); p1 < 0: to the end. Where a rewalk has failed, from its
    // beginning: the tokens of this call only.
    void remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void keep(llama_seq_id seq_id);
    // In one pool the sequences share records. Streams have their own cells: there the copy is one, whole, as upstream's is.
    // Throws where there is no room for a copy.
    void copy(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
    void clear(bool data);

    // Copies of records, for one sequence to take in: their bytes go to the host, and come back when a step wants them.
    // Throws with nothing changed but host copies of the originals.
    std::vector<uint32_t> clone(const std::vector<uint32_t> & ids);

private:
    const settings & config;
    layer_groups &   groups;
    token_table &    tokens;
    transfers &      moves;
    scores &         scored;
};

} // namespace asrkf
