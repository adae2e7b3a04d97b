// One group's cells and tensors: upstream's cache, whose cells we may also empty and fill one by one. What is a member of
// llama_kv_cache and private upstream is used here and nowhere else.
//
// Which cells are taken, and which a sequence has active, stands in sets: slots and masks are questions about all cells, of all
// groups, in each step. Upstream's own books of cells are search trees, and cost more than all else where many tokens move. They
// are kept where upstream reads them only: for masks of sliding windows, ALiBi and positions with more than one number.
#pragma once

#include "common.h"
#include "llama/key_rotation.h"
#include "policy/token_set.h"

#include "llama-kv-cache.h"

#include "ggml-backend.h"

#include <map>
#include <string>
#include <vector>

namespace asrkf {

class group_cache final : public llama_kv_cache {
public:
    using llama_kv_cache::llama_kv_cache;

    // K and V of each layer; the order defines a token's bytes in the host store
    std::vector<ggml_tensor *> row_tensors() const;
    bool          has_layer(uint32_t il) const { return map_layer_ids.count(int32_t(il)) > 0; }
    ggml_tensor * k_of(uint32_t il) const { return has_layer(il) ? layers[size_t(map_layer_ids.at(int32_t(il)))].k : nullptr; }
    ggml_tensor * v_of(uint32_t il) const { return has_layer(il) ? layers[size_t(map_layer_ids.at(int32_t(il)))].v : nullptr; }
    uint64_t      device_bytes() const;

    // Cells are numbered over all streams: tensors hold one stream's cells after the other's.
    uint32_t n_cells() const { return get_size()*n_stream; }
    uint32_t n_used() const;
    uint32_t n_kv(const slot_info & slot) const; // get_n_kv(): cells that attention goes over
    uint32_t stream_of(uint32_t seq) const { return seq_to_stream[seq]; }
    uint32_t cell_at(const slot_info & slot, uint32_t i) const { return slot.strm[i / slot.size()]*get_size() + slot.idxs[i / slot.size()][i % slot.size()]; }

    bool     is_active(uint32_t cell, uint32_t seq) const { return active[seq].has(cell % get_size()); }
    const token_set & active_cells(uint32_t seq) const { return active[seq]; } // of its stream
    uint32_t n_active(uint32_t cell) const { return n_sequences[cell]; }

    // Out of a sequence's attention; true if no other has it active, so that the cell is free.
    bool take_out(uint32_t cell, uint32_t seq);
    void put_in(uint32_t cell, llama_pos pos, llama_token token);
    void activate(uint32_t cell, uint32_t seq);
    void move_to(uint32_t cell, llama_pos pos); // the row has been rotated already: see rotate()

    void clear(bool data) override;

    // n free cells where this sequence may have them, or fewer: the lowest, as attention costs up to the highest.
    std::vector<uint32_t> free_cells(size_t n, uint32_t seq) const;
    // A slot of such cells, never a taken one; none if there are too few. find_slot() looks at cell after cell.
    slot_info find_free(const llama_ubatch & ubatch) const;
    void      apply(const slot_info & slot, const llama_ubatch & ubatch); // apply_ubatch()
    void      write_mask(ggml_tensor * mask, const llama_ubatch & ubatch, const slot_info & slot, bool causal) const; // set_input_kq_mask()

    // k_cur: layer il's keys in a graph of the model, which tells how positions are in them.
    void note_rotation(uint32_t il, const ggml_tensor * k_cur);
    // Why keys cannot be taken to other positions; "" if they can. llama.cpp builds a graph when it makes a context, so this is known.
    std::string why_no_shift() const;
    // Rows [n] of layer il's K, as stored, to other positions: what upstream's K-shift does (llama_kv_cache::build_rope_shift), on
    // the host, since most of them may be there. Throws error(ASRKF_MOVE_FAILED or ASRKF_INTERNAL).
    void rotate(ggml_backend_t cpu, uint32_t il, std::vector<uint8_t> & rows, const std::vector<int32_t> & shifts) const;

private:
    std::map<uint32_t, key_rotation> rotations; // by layer

    std::vector<token_set> none(uint32_t n) const;
    void set_active(uint32_t cell, uint32_t seq);

    const bool             keeps_books = makes_anew || swa_type != LLAMA_SWA_TYPE_NONE || hparams.use_alibi || has_cell_ext();
    std::vector<token_set> taken       = none(n_stream);  // by stream
    std::vector<token_set> active      = none(n_seq_max); // by sequence, in its stream
    std::vector<uint16_t>  n_sequences = std::vector<uint16_t>(n_cells(), 0); // by cell: that have it active
};

} // namespace asrkf
