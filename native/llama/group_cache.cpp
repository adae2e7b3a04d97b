#include "llama/group_cache.h"

#include "common.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

namespace asrkf {

std::vector<ggml_tensor *> group_cache::row_tensors() const {
    std::vector<ggml_tensor *> tensors;
    for (const auto & layer : layers) {
        tensors.push_back(layer.k);
        tensors.push_back(layer.v);
    }
    return tensors;
}

uint64_t group_cache::device_bytes() const {
    uint64_t n_bytes = 0;
    for (const auto & [buft, size] : memory_breakdown()) {
        n_bytes += size;
    }
    return n_bytes;
}

uint32_t group_cache::n_used() const {
    return std::accumulate(taken.begin(), taken.end(), 0u, [](uint32_t n, const token_set & cells) { return n + cells.n_in(); });
}

uint32_t group_cache::n_kv(const slot_info & slot) const {
    const uint32_t unit = std::max(n_pad, 256u);
    uint32_t n = unit;
    for (const llama_seq_id stream : slot.strm) {
        n = std::max(n, (taken[size_t(stream)].end() + unit - 1) / unit*unit);
    }
    return std::min(n, get_size());
}

std::vector<token_set> group_cache::none(uint32_t n) const {
    token_set cells;
    cells.assign(get_size());
    return std::vector<token_set>(n, cells);
}

bool group_cache::take_out(uint32_t cell, uint32_t seq) {
    const uint32_t stream = cell / get_size(), i = cell % get_size();
    if (keeps_books) {
        v_cells[stream].seq_rm(i, llama_seq_id(seq));
    }
    active[seq].put(i, false);
    const bool is_free = --n_sequences[cell] == 0;
    taken[stream].put(i, !is_free);
    return is_free;
}

void group_cache::put_in(uint32_t cell, llama_pos pos, llama_token token) {
    const uint32_t stream = cell / get_size(), i = cell % get_size();
    if (keeps_books) {
        llama_kv_cell_ext ext;
        ext.tok = token;
        v_cells[stream].pos_set(i, pos);
        v_cells[stream].ext_set(i, ext);
    }
    taken[stream].put(i, true);
}

void group_cache::activate(uint32_t cell, uint32_t seq) {
    if (keeps_books) {
        v_cells[cell / get_size()].seq_add(cell % get_size(), llama_seq_id(seq));
    }
    set_active(cell, seq);
}

void group_cache::set_active(uint32_t cell, uint32_t seq) {
    active[seq].put(cell % get_size(), true);
    n_sequences[cell]++;
}

void group_cache::move_to(uint32_t cell, llama_pos pos) {
    if (!keeps_books) {
        return;
    }
    auto & cells = v_cells[cell / get_size()];
    const uint32_t i = cell % get_size();
    const auto sequences = cells.seq_get_all(i);
    const auto ext = cells.ext_get(i);
    cells.rm(i);
    cells.pos_set(i, pos);
    cells.ext_set(i, ext);
    for (uint32_t seq = 0; seq < sequences.size(); ++seq) {
        if (sequences.test(seq)) {
            cells.seq_add(i, llama_seq_id(seq));
        }
    }
}

void group_cache::clear(bool data) {
    llama_kv_cache::clear(data);
    taken  = none(n_stream);
    active = none(n_seq_max);
    n_sequences.assign(n_cells(), 0);
}

std::vector<uint32_t> group_cache::free_cells(size_t n, uint32_t seq) const {
    std::vector<uint32_t> result;
    const uint32_t first = stream_of(seq)*get_size();
    const token_set & cells = taken[stream_of(seq)];
    for (uint32_t w = 0; w < cells.n_words() && result.size() < n; ++w) {
        token_set::each(w, ~cells.word(w) & token_set::within(w, 0, cells.size()), [&](uint32_t i) { result.push_back(first + i); });
    }
    result.resize(std::min(n, result.size()));
    return result;
}

llama_kv_cache::slot_info group_cache::find_free(const llama_ubatch & ubatch) const {
    const uint32_t n_seqs = n_stream > 1 ? ubatch.n_seqs_unq : 1, n = ubatch.n_tokens / n_seqs;
    slot_info slot = { LLAMA_MAX_SEQ, 0, {}, {} };
    for (uint32_t i = 0; i < n_seqs; ++i) {
        const uint32_t seq = uint32_t(ubatch.seq_id_unq[i]), stream = seq_to_stream[seq];
        slot.s0 = std::min(slot.s0, stream);
        slot.s1 = std::max(slot.s1, stream);
        slot.strm.push_back(llama_seq_id(stream));
        slot.idxs.emplace_back();
        for (const uint32_t cell : free_cells(n, seq)) {
            slot.idxs.back().push_back(cell % get_size());
        }
        if (slot.idxs.back().size() < n) {
            return {};
        }
    }
    return slot;
}

void group_cache::apply(const slot_info & slot, const llama_ubatch & ubatch) {
    if (keeps_books) {
        apply_ubatch(slot, ubatch);
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const uint32_t cell = cell_at(slot, i);
        taken[cell / get_size()].put(cell % get_size(), true);
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            set_active(cell, uint32_t(ubatch.seq_id[i][s]));
        }
    }
}

// What a sequence has active comes before the step's tokens, but for these.
void group_cache::write_mask(ggml_tensor * mask, const llama_ubatch & ubatch, const slot_info & slot, bool causal) const {
    if (keeps_books) {
        return set_input_kq_mask(mask, &ubatch, causal);
    }
    GGML_ASSERT(mask->type == GGML_TYPE_F16); // that of flash attention
    static const ggml_fp16_t masked = ggml_fp32_to_fp16(-INFINITY);
    static const auto masks = [] { // of eight cells, by their bits
        std::array<std::array<ggml_fp16_t, 8>, 256> made;
        for (size_t bits = 0; bits < made.size(); ++bits) {
            for (size_t i = 0; i < 8; ++i) {
                made[bits][i] = bits >> i & 1 ? 0 : masked;
            }
        }
        return made;
    }();
    const bool sees_later = !causal && hparams.non_causal_type != LLAMA_NON_CAUSAL_TYPE_SWA_ONLY;
    const uint32_t n_kv = uint32_t(mask->ne[0]), n = uint32_t(slot.size()); // of a stream
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const token_set & seen = active[size_t(ubatch.seq_id[i][0])];
        auto * row = static_cast<ggml_fp16_t *>(mask->data) + size_t(i)*n_kv;
        for (uint32_t first = 0; first < n_kv; first += 64) {
            const uint64_t bits = seen.word(first / 64);
            const uint32_t end  = std::min(n_kv, first + 64);
            if (bits == ~uint64_t(0)) { // most are: a pool is full
                std::memset(row + first, 0, (end - first)*sizeof(*row));
                continue;
            }
            for (uint32_t cell = first; cell < end; cell += 8) {
                std::memcpy(row + cell, masks[bits >> (cell - first) & 255].data(), sizeof(masks[0]));
            }
        }
        for (uint32_t j = 0; !sees_later && j < n; ++j) { // of the step's tokens of this stream
            if (ubatch.pos[i / n*n + j] > ubatch.pos[i]) {
                row[slot.idxs[i / n][j]] = masked;
            }
        }
    }
}

void group_cache::note_rotation(uint32_t il, const ggml_tensor * k_cur) {
    if (has_layer(il)) {
        rotations[il] = rotation_of(k_cur);
    }
}

std::string group_cache::why_no_shift() const {
    for (const auto & layer : layers) {
        const auto found = rotations.find(layer.il);
        if (found == rotations.end() || found->second.is == key_rotation::kind::other) {
            return format("layer %u of %s has positions in its keys in a way that a shift cannot follow", layer.il, model.arch_name().c_str());
        }
    }
    return get_can_shift() ? "" : format("%s does not allow it", model.arch_name().c_str());
}

void group_cache::rotate(ggml_backend_t cpu, uint32_t il, std::vector<uint8_t> & rows, const std::vector<int32_t> & shifts) const {
    const key_rotation & how = rotations.at(il);
    if (how.is == key_rotation::kind::none) {
        return;
    }
    const ggml_tensor * k = k_of(il);
    const int64_t n = int64_t(shifts.size()), n_head_kv = hparams.n_head_kv(il);
    ggml_init_params params = { 32*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr holder(ggml_init(params));
    ggml_context * ctx = holder.get();
    ggml_tensor * all     = ggml_new_tensor_3d(ctx, k->type, k->ne[0] / n_head_kv, n_head_kv, n);
    ggml_tensor * by      = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ggml_tensor * factors = how.factors ? ggml_dup_tensor(ctx, how.factors) : nullptr;
    ggml_tensor * rot     = nullptr;
    ggml_cgraph * graph   = ggml_new_graph(ctx);
    if (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_F32) {
        ggml_build_forward_expand(graph, turn(ctx, how, all, by, factors));
    } else { // upstream's way with quantised keys, but of whole heads, whatever part of them is turned
        rot = build_input_k_rot(ctx);
        ggml_tensor * keys = ggml_cast(ctx, all, GGML_TYPE_F32);
        keys = rot ? llama_mul_mat_hadamard(ctx, keys, rot) : keys;
        ggml_build_forward_expand(graph, turn(ctx, how, keys, by, factors)); // within keys
        keys = rot ? llama_mul_mat_hadamard(ctx, keys, rot) : keys;
        ggml_build_forward_expand(graph, ggml_cpy(ctx, keys, all));
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, cpu));
    if (!buffer) {
        throw error(ASRKF_INTERNAL, "no host memory to rotate keys in");
    }
    ggml_backend_tensor_set(all, rows.data(), 0, rows.size());
    ggml_backend_tensor_set(by, shifts.data(), 0, ggml_nbytes(by));
    if (rot) {
        set_input_k_rot(rot);
    }
    if (factors) {
        std::vector<uint8_t> bytes(ggml_nbytes(factors));
        ggml_backend_tensor_get(how.factors, bytes.data(), 0, bytes.size());
        ggml_backend_tensor_set(factors, bytes.data(), 0, bytes.size());
    }
    if (ggml_backend_graph_compute(cpu, graph) != GGML_STATUS_SUCCESS) {
        throw error(ASRKF_MOVE_FAILED, "the keys of shifted positions could not be rotated");
    }
    ggml_backend_tensor_get(all, rows.data(), 0, rows.size());
}

} // namespace asrkf
