// Positions that change: rows are rotated at once, wherever they are. Records that other sequences have, too, are copied
// first: those sequences keep theirs.
#pragma once

#include "llama/sequence_ops.h"

#include <functional>

namespace asrkf {

class shifts {
public:
    shifts(const settings & config, layer_groups & groups, token_table & tokens, transfers & moves, scores & scored, sequence_ops & sequences)
        : config(config), groups(groups), tokens(tokens), moves(moves), scored(scored), sequences(sequences) {}

    // Tokens at positions [p0, p1) go where `moved` says; below 0 they are gone, as upstream's are. Throws where rows cannot be
    // copied or rotated: some may be by then, so the sequence must not be used as it is.
    void move(sequence & s, llama_pos p0, llama_pos p1, const std::function<llama_pos(llama_pos)> & moved);

private:
    void own_shared(sequence & s, uint32_t begin, uint32_t end);
    void book(sequence & s, uint32_t begin, const std::vector<uint32_t> & ids, const std::vector<int32_t> & by);
    void reorder(sequence & s);
    void rotate(size_t ig, const std::vector<uint32_t> & ids, const std::vector<int32_t> & by);
    void rotate_batch(size_t ig, ggml_backend_t cpu, const std::vector<uint32_t> & ids, const std::vector<int32_t> & by);
    void rotate_keys(group & g, ggml_backend_t cpu, const std::vector<uint8_t *> & hosts, const std::vector<int32_t> & by);

    const settings & config;
    layer_groups &   groups;
    token_table &    tokens;
    transfers &      moves;
    scores &         scored;
    sequence_ops &   sequences;
};

} // namespace asrkf
