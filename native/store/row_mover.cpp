#include "store/row_mover.h"

#include "store/host_store.h"
#include "store/row_copier.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>

namespace asrkf {

constexpr size_t STAGING_ALIGN = 256; // of each tensor's part of the staging buffer

thread_local uint32_t fail_move_in = 0;

static size_t padded(size_t n_bytes) { return (n_bytes + STAGING_ALIGN - 1) / STAGING_ALIGN * STAGING_ALIGN; }

// BLAS-like backends share the CPU's buffers but not its operations.
static bool moves_rows(ggml_backend_t backend) {
    ggml_init_params params = { 8*ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr holder(ggml_init(params));
    ggml_context * ctx = holder.get();
    ggml_tensor * rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 64, 64);
    ggml_tensor * part = ggml_get_rows(ctx, rows, ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 8));
    ggml_tensor * back = ggml_set_rows(ctx, rows, part, ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 8));
    return ggml_backend_supports_op(backend, part) && ggml_backend_supports_op(backend, back);
}

// One direction's host memory, laid out as the staging buffer is: for a copier the table of slices, then the cells' numbers of each
// group, then its rows, tensor by tensor.
struct row_mover::crossing {
    struct slice {
        size_t             group;
        const row_tensor * tensor; // null: the cells' numbers
        size_t             first, n; // of rows
        size_t             at;     // bytes
    };
    ggml_backend_buffer_ptr memory;
    ggml_backend_event_ptr  event; // null where the device has none: its transfers are waited for at once
    bool                    busy = false;
    std::vector<row>        rows;
    std::vector<slice>      slices;
    size_t                  n_index_bytes = 0, n_bytes = 0;

    uint8_t * base() const { return static_cast<uint8_t *>(ggml_backend_buffer_get_base(memory.get())); }

    // For a copier, at the beginning. Returns how many slices.
    uint32_t write_table() const {
        std::vector<row_slice> table;
        std::vector<size_t> cells_at; // by group
        for (const slice & s : slices) {
            if (!s.tensor) {
                cells_at.resize(std::max(cells_at.size(), s.group + 1));
                cells_at[s.group] = s.at;
                continue;
            }
            const ggml_tensor * rows = s.tensor->tensor;
            table.push_back({ static_cast<uint8_t *>(rows->data), rows->nb[1], cells_at[s.group], s.at, uint32_t(s.tensor->row_bytes), uint32_t(s.n) });
        }
        std::memcpy(base(), table.data(), table.size()*sizeof(row_slice));
        return uint32_t(table.size());
    }
    uint32_t most_rows() const {
        size_t most = 0;
        for (const slice & s : slices) {
            most = std::max(most, s.n);
        }
        return uint32_t(most);
    }

    template <typename Index> void write_indices() const {
        for (const slice & s : slices) {
            for (size_t i = 0; !s.tensor && i < s.n; ++i) {
                const Index cell = Index(rows[s.first + i].cell);
                std::memcpy(base() + s.at + i*sizeof(cell), &cell, sizeof(cell));
            }
        }
    }

    void copy_rows(bool to_hosts) const {
        for (const slice & s : slices) {
            for (size_t i = 0; s.tensor && i < s.n; ++i) {
                uint8_t * ours = base() + s.at + i*s.tensor->row_bytes, * host = rows[s.first + i].host + s.tensor->offset;
                std::memcpy(to_hosts ? host : ours, to_hosts ? ours : host, s.tensor->row_bytes);
            }
        }
    }
};

struct row_mover::lane {
    ggml_backend_buffer_type_t           buft    = nullptr;
    ggml_backend_t                       backend = nullptr;
    std::vector<std::vector<row_tensor>> tensors;       // by group
    size_t                               table_bytes = 0; // for the copier
    size_t                               graph_size  = 0; // a node a tensor, two leaves, and one a group
    std::vector<uint8_t>                 graph_meta;      // memory of the graph's tensors
    crossing                             down, up;
    ggml_backend_buffer_ptr              staging;         // null where the device reaches the crossings. It goes before them: a device frees nothing that is in use
    std::unique_ptr<row_copier>          copier;          // null: a graph moves rows. The first to go: it waits
    std::string                          why_no_copier;

    // What n rows of a group take at most: n times the one, and the other.
    size_t bytes_of_row(size_t group) const {
        size_t n_bytes = sizeof(int64_t);
        for (const row_tensor & t : tensors[group]) {
            n_bytes += t.row_bytes;
        }
        return n_bytes;
    }
    size_t bytes_of_padding(size_t group) const { return STAGING_ALIGN*(tensors[group].size() + 1); }

    void allocate(host_budget & budget) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        copier = make_row_copier(dev ? dev : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), why_no_copier); // the CPU's buffers name no device
        size_t n_bytes = 0, n_tensors = 0;
        for (size_t ig = 0; ig < tensors.size(); ++ig) {
            n_bytes   += tensors[ig].empty() ? 0 : bytes_of_padding(ig) + STAGING_ROWS*bytes_of_row(ig);
            n_tensors += tensors[ig].size();
        }
        table_bytes = copier ? padded(n_tensors*sizeof(row_slice)) : 0;
        n_bytes += table_bytes;
        for (crossing * c : { &down, &up }) {
            c->memory.reset(allocate_host(dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr, padded(n_bytes), budget));
            c->event.reset(dev ? ggml_backend_event_new(dev) : nullptr);
        }
        const bool needs_staging = !copier || !down.memory || !up.memory || !copier->reaches(down.base()) || !copier->reaches(up.base());
        if (needs_staging) {
            staging.reset(ggml_backend_buft_alloc_buffer(buft, padded(n_bytes)));
        }
        if ((needs_staging && !staging) || !down.memory || !up.memory) {
            throw error(ASRKF_INTERNAL, format("no %zu bytes for the staging buffer on %s: lower kv_pool", padded(n_bytes), ggml_backend_buft_name(buft)));
        }
        graph_size = 2*n_tensors + tensors.size();
        graph_meta.resize((4*n_tensors + tensors.size() + 4)*ggml_tensor_overhead() + ggml_graph_overhead_custom(graph_size, false));
    }

    // As many rows from `begin` on as the staging buffer holds; those of other devices take no room. Returns the first that
    // does not fit.
    size_t lay_out(crossing & c, const std::vector<row> & rows, size_t begin) const {
        size_t left = ggml_backend_buffer_get_size(c.memory.get()) - table_bytes, end = begin;
        c.slices.clear();
        c.n_bytes = table_bytes;
        while (end < rows.size()) {
            const size_t group = rows[end].group;
            size_t n = 1;
            while (end + n < rows.size() && rows[end + n].group == group) {
                n++;
            }
            if (!tensors[group].empty()) {
                const size_t padding = bytes_of_padding(group), each = bytes_of_row(group);
                n = std::min(n, left > padding ? (left - padding) / each : 0);
                if (n == 0) {
                    break;
                }
                left -= padding + n*each;
                c.slices.push_back({ group, nullptr, end - begin, n, c.n_bytes });
                c.n_bytes += padded(n*sizeof(int64_t));
            }
            end += n;
        }
        c.n_index_bytes = c.n_bytes;
        for (size_t i = 0, n_groups = c.slices.size(); i < n_groups; ++i) {
            const crossing::slice s = c.slices[i];
            for (const row_tensor & t : tensors[s.group]) {
                c.slices.push_back({ s.group, &t, s.first, s.n, c.n_bytes });
                c.n_bytes += padded(s.n*t.row_bytes);
            }
        }
        c.rows.assign(rows.begin() + std::ptrdiff_t(begin), rows.begin() + std::ptrdiff_t(end));
        return end;
    }

    void move(const std::vector<row> & rows, bool to_host) {
        crossing & c = to_host ? down : up;
        for (size_t begin = 0; begin < rows.size(); ) {
            finish(c);
            begin = lay_out(c, rows, begin);
            if (!c.slices.empty()) {
                move_piece(c, to_host);
            }
        }
    }

    ggml_tensor * place(ggml_tensor * tensor, ggml_backend_buffer_t buffer, void * address) const {
        if (ggml_backend_tensor_alloc(buffer, tensor, address) != GGML_STATUS_SUCCESS) {
            throw error(ASRKF_MOVE_FAILED, format("%s refused a tensor of the staging buffer", ggml_backend_buft_name(buft)));
        }
        return tensor;
    }

    void move_piece(crossing & c, bool to_host) {
        ggml_init_params params = { graph_meta.size(), graph_meta.data(), true };
        ggml_context_ptr holder(ggml_init(params));
        if (copier) {
            c.write_indices<uint32_t>();
        } else if (to_host) {
            c.write_indices<int32_t>(); // as get_rows and set_rows want them
        } else {
            c.write_indices<int64_t>();
        }
        const uint32_t n_slices = copier ? c.write_table() : 0;
        if (!to_host) {
            c.copy_rows(false);
        }
        ggml_cgraph * graph = copier ? nullptr : make_graph(holder.get(), c, to_host);
        run(holder.get(), c, to_host, [&] {
            if (copier) {
                copier->copy(backend, staging ? static_cast<uint8_t *>(ggml_backend_buffer_get_base(staging.get())) : c.base(), n_slices, c.most_rows(), to_host);
            } else if (ggml_backend_graph_compute_async(backend, graph) != GGML_STATUS_SUCCESS) {
                throw error(ASRKF_MOVE_FAILED, format("%s failed to move %zu rows", ggml_backend_name(backend), c.rows.size()));
            }
        });
    }

    ggml_cgraph * make_graph(ggml_context * ctx, const crossing & c, bool to_host) const {
        ggml_cgraph * graph = ggml_new_graph_custom(ctx, graph_size, false);
        auto * base = static_cast<uint8_t *>(ggml_backend_buffer_get_base(staging.get()));
        std::vector<ggml_tensor *> cells(tensors.size(), nullptr);
        for (const auto & s : c.slices) {
            if (!s.tensor) {
                cells[s.group] = place(ggml_new_tensor_1d(ctx, to_host ? GGML_TYPE_I32 : GGML_TYPE_I64, int64_t(s.n)), staging.get(), base + s.at);
                continue;
            }
            const ggml_tensor * rows = s.tensor->tensor;
            const int64_t n_words = int64_t(s.tensor->row_bytes / 4);
            ggml_tensor * cache = place(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_words, rows->ne[1]*rows->ne[2]), rows->buffer, rows->data);
            ggml_tensor * stage = to_host ? ggml_get_rows(ctx, cache, cells[s.group]) : ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_words, int64_t(s.n));
            place(stage, staging.get(), base + s.at);
            ggml_tensor * done  = to_host ? stage : ggml_set_rows(ctx, cache, stage, cells[s.group]);
            if (!done->buffer && ggml_backend_view_init(done) != GGML_STATUS_SUCCESS) {
                throw error(ASRKF_MOVE_FAILED, "a view of the cache could not be made");
            }
            ggml_build_forward_expand(graph, done);
        }
        return graph;
    }

    // queue: throws where the device refuses the moves.
    template <typename Queue> void run(ggml_context * ctx, crossing & c, bool to_host, Queue queue) {
        std::string failed;
        ggml_tensor * all = nullptr; // the part of the staging buffer that is in use
        if (staging) {
            const crossing & other = to_host ? up : down; // uploads may have a queue of their own (Vulkan's): not before the other has left the buffer
            if (other.busy && other.event) {
                ggml_backend_event_wait(backend, other.event.get());
            }
            all = place(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, int64_t(c.n_bytes / 4)), staging.get(), ggml_backend_buffer_get_base(staging.get()));
            ggml_backend_tensor_set_async(backend, all, c.base(), 0, to_host ? c.n_index_bytes : c.n_bytes);
        }
        try {
            queue();
        } catch (const error & e) {
            failed = e.what();
        }
        if (to_host && all && failed.empty()) {
            ggml_backend_tensor_get_async(backend, all, c.base() + c.n_index_bytes, c.n_index_bytes, c.n_bytes - c.n_index_bytes);
        }
        c.busy = true;
        if (c.event) {
            ggml_backend_event_record(c.event.get(), backend);
        } else {
            ggml_backend_synchronize(backend);
        }
        if (!failed.empty()) {
            throw error(ASRKF_MOVE_FAILED, failed);
        }
    }

    // The crossing's memory is free, and what it brought is at its host addresses.
    void finish(crossing & c) {
        if (!c.busy) {
            return;
        }
        if (c.event) {
            ggml_backend_event_synchronize(c.event.get());
        }
        c.busy = false;
        if (&c == &down) {
            c.copy_rows(true);
        }
    }
};

row_mover::row_mover(const std::vector<std::vector<ggml_tensor *>> & tensors, moves_kind kind, host_budget & budget) : groups(tensors.size()) {
    for (size_t ig = 0; ig < tensors.size(); ++ig) {
        group_rows & g = groups[ig];
        for (ggml_tensor * tensor : tensors[ig]) {
            const row_tensor row = { tensor, ggml_row_size(tensor->type, tensor->ne[0]), g.token_bytes };
            g.token_bytes += row.row_bytes;
            const bool is_host = tensor->buffer && ggml_backend_buffer_is_host(tensor->buffer);
            if (!is_host && kind == MOVES_DIRECT) {
                throw error(ASRKF_UNSUPPORTED, format("moves=direct needs device memory that is host memory; %s is not: use moves=auto",
                        tensor->buffer ? ggml_backend_buffer_name(tensor->buffer) : "it"));
            }
            const bool is_direct = is_host && kind != MOVES_STAGED;
            g.is_staged = g.is_staged || !is_direct;
            if (is_direct) {
                g.direct.push_back(row);
            } else if (row.row_bytes % 4 != 0) {
                g.one_by_one.push_back(row);
            } else {
                lane_of(ggml_backend_buffer_get_type(tensor->buffer)).tensors[ig].push_back(row);
            }
        }
    }
    for (auto & l : lanes) {
        l->allocate(budget);
    }
}

row_mover::~row_mover() = default;

row_mover::lane & row_mover::lane_of(ggml_backend_buffer_type_t buft) {
    for (auto & l : lanes) {
        if (l->buft == buft) {
            return *l;
        }
    }
    lanes.push_back(std::make_unique<lane>());
    lanes.back()->buft = buft;
    lanes.back()->tensors.resize(groups.size());
    return *lanes.back();
}

size_t row_mover::staging_bytes() const {
    size_t n_bytes = 0;
    for (const auto & l : lanes) {
        n_bytes += l->staging ? ggml_backend_buffer_get_size(l->staging.get()) : 0;
    }
    return n_bytes;
}

std::vector<std::string> row_mover::notes() const {
    std::vector<std::string> all;
    for (const auto & l : lanes) {
        if (!l->why_no_copier.empty()) {
            all.push_back(l->why_no_copier);
        }
    }
    return all;
}

void row_mover::attach(const std::vector<ggml_backend_t> & backends) {
    for (auto & l : lanes) {
        for (ggml_backend_t backend : backends) {
            if (ggml_backend_supports_buft(backend, l->buft) && moves_rows(backend)) {
                l->backend = backend;
                break;
            }
        }
        if (!l->backend) {
            throw error(ASRKF_UNSUPPORTED, format("no backend of this context computes on %s", ggml_backend_buft_name(l->buft)));
        }
    }
    attached = true;
}

void row_mover::move(const std::vector<row> & rows, bool to_host) {
    if (fail_move_in > 0 && --fail_move_in == 0) {
        move({ rows.begin(), rows.begin() + std::ptrdiff_t(rows.size() / 2) }, to_host);
        settle();
        throw error(ASRKF_MOVE_FAILED, "this move was to fail");
    }
    for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
        const group_rows & g = groups[rows[begin].group];
        while (end < rows.size() && rows[end].group == rows[begin].group) {
            end++;
        }
        for (const row_tensor & t : g.direct) {
            auto * base = static_cast<uint8_t *>(t.tensor->data);
            for (size_t i = begin; i < end; ++i) {
                uint8_t * cell = base + rows[i].cell*t.tensor->nb[1], * host = rows[i].host + t.offset;
                std::memcpy(to_host ? host : cell, to_host ? cell : host, t.row_bytes);
            }
        }
        for (const row_tensor & t : g.one_by_one) {
            for (size_t i = begin; i < end; ++i) {
                if (to_host) {
                    ggml_backend_tensor_get(t.tensor, rows[i].host + t.offset, rows[i].cell*t.tensor->nb[1], t.row_bytes);
                } else {
                    ggml_backend_tensor_set(t.tensor, rows[i].host + t.offset, rows[i].cell*t.tensor->nb[1], t.row_bytes);
                }
            }
        }
    }
    try {
        for (auto & l : lanes) {
            l->move(rows, to_host);
        }
    } catch (...) {
        settle();
        throw;
    }
}

void row_mover::settle() {
    for (auto & l : lanes) {
        l->finish(l->down);
    }
}

} // namespace asrkf
