#include "store/row_mover.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>

namespace asrkf {

constexpr size_t STAGING_ROWS  = 64;  // tokens per transfer
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

struct row_mover::lane {
    ggml_backend_buffer_type_t buft    = nullptr;
    ggml_backend_t             backend = nullptr;
    std::vector<row_tensor>    rows;
    ggml_backend_buffer_ptr    staging;    // rows, then the indices
    ggml_backend_buffer_ptr    bounce;     // the same bytes on the host
    size_t                     index_offset = 0;
    std::vector<uint8_t>       graph_meta; // memory of the graph's tensors

    void allocate() {
        size_t n_bytes = 0;
        for (const auto & row : rows) {
            n_bytes += padded(row.row_bytes*STAGING_ROWS);
        }
        index_offset = n_bytes;
        n_bytes += padded(STAGING_ROWS*sizeof(int64_t));
        staging.reset(ggml_backend_buft_alloc_buffer(buft, n_bytes));
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        ggml_backend_buffer_type_t host = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;
        bounce.reset(ggml_backend_buft_alloc_buffer(host ? host : ggml_backend_cpu_buffer_type(), n_bytes));
        if (!staging || !bounce) {
            throw error(ASRKF_INTERNAL, format("no %zu bytes for the staging buffer on %s: lower kv_pool", n_bytes, ggml_backend_buft_name(buft)));
        }
        graph_meta.resize((4*rows.size() + 4)*ggml_tensor_overhead() + ggml_graph_overhead_custom(2*rows.size() + 8, false));
    }

    ggml_tensor * place(ggml_tensor * tensor, ggml_backend_buffer_t buffer, void * address) const {
        if (ggml_backend_tensor_alloc(buffer, tensor, address) != GGML_STATUS_SUCCESS) {
            throw error(ASRKF_MOVE_FAILED, format("%s refused a tensor of the staging buffer", ggml_backend_buft_name(buft)));
        }
        return tensor;
    }

    void move(const uint32_t * cells, uint8_t * const * hosts, size_t n, bool to_host) {
        ggml_init_params params = { graph_meta.size(), graph_meta.data(), true };
        ggml_context_ptr holder(ggml_init(params));
        ggml_context * ctx  = holder.get();
        ggml_cgraph  * graph = ggml_new_graph_custom(ctx, 2*rows.size() + 8, false);
        auto * base        = static_cast<uint8_t *>(ggml_backend_buffer_get_base(staging.get()));
        auto * host        = static_cast<uint8_t *>(ggml_backend_buffer_get_base(bounce.get()));
        ggml_tensor * idx  = place(ggml_new_tensor_1d(ctx, to_host ? GGML_TYPE_I32 : GGML_TYPE_I64, int64_t(n)), staging.get(), base + index_offset);

        size_t used = 0;
        for (const auto & row : rows) {
            const int64_t words = int64_t(row.row_bytes / 4);
            ggml_tensor * cache = place(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, words, row.tensor->ne[1]*row.tensor->ne[2]), row.tensor->buffer, row.tensor->data);
            ggml_tensor * stage;
            if (to_host) {
                stage = place(ggml_get_rows(ctx, cache, idx), staging.get(), base + used);
                ggml_build_forward_expand(graph, stage);
            } else {
                stage = place(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, words, int64_t(n)), staging.get(), base + used);
                ggml_tensor * done = ggml_set_rows(ctx, cache, stage, idx);
                if (!done->buffer && ggml_backend_view_init(done) != GGML_STATUS_SUCCESS) {
                    throw error(ASRKF_MOVE_FAILED, "a view of the cache could not be made");
                }
                ggml_build_forward_expand(graph, done);
                for (size_t i = 0; i < n; ++i) {
                    std::memcpy(host + used + i*row.row_bytes, hosts[i] + row.offset, row.row_bytes);
                }
            }
            used += padded(row.row_bytes*n);
        }
        ggml_tensor * all = place(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, int64_t(used / 4)), staging.get(), base);

        if (to_host) {
            std::vector<int32_t> index(cells, cells + n);
            ggml_backend_tensor_set(idx, index.data(), 0, n*sizeof(int32_t));
        } else {
            std::vector<int64_t> index(cells, cells + n);
            ggml_backend_tensor_set(idx, index.data(), 0, n*sizeof(int64_t));
            ggml_backend_tensor_set(all, host, 0, used);
        }
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            throw error(ASRKF_MOVE_FAILED, format("%s failed to move %zu rows", ggml_backend_name(backend), n));
        }
        if (to_host) {
            ggml_backend_tensor_get(all, host, 0, used);
            used = 0;
            for (const auto & row : rows) {
                for (size_t i = 0; i < n; ++i) {
                    std::memcpy(hosts[i] + row.offset, host + used + i*row.row_bytes, row.row_bytes);
                }
                used += padded(row.row_bytes*n);
            }
        }
    }
};

row_mover::row_mover(const std::vector<ggml_tensor *> & tensors, moves_kind kind) {
    for (ggml_tensor * tensor : tensors) {
        const row_tensor row = { tensor, ggml_row_size(tensor->type, tensor->ne[0]), bytes_per_token };
        bytes_per_token += row.row_bytes;
        const bool is_host = tensor->buffer && ggml_backend_buffer_is_host(tensor->buffer);
        if (!is_host && kind == MOVES_DIRECT) {
            throw error(ASRKF_UNSUPPORTED, format("moves=direct needs device memory that is host memory; %s is not: use moves=auto",
                    tensor->buffer ? ggml_backend_buffer_name(tensor->buffer) : "it"));
        }
        if (is_host && kind != MOVES_STAGED) {
            direct.push_back(row);
            continue;
        }
        staged = true;
        if (row.row_bytes % 4 != 0) {
            one_by_one.push_back(row);
            continue;
        }
        const auto buft = ggml_backend_buffer_get_type(tensor->buffer);
        auto found = std::find_if(lanes.begin(), lanes.end(), [&](const auto & l) { return l->buft == buft; });
        if (found == lanes.end()) {
            lanes.push_back(std::make_unique<lane>());
            lanes.back()->buft = buft;
            found = lanes.end() - 1;
        }
        (*found)->rows.push_back(row);
    }
    for (auto & l : lanes) {
        l->allocate();
    }
}

row_mover::~row_mover() = default;

size_t row_mover::staging_bytes() const {
    size_t n_bytes = 0;
    for (const auto & l : lanes) {
        n_bytes += ggml_backend_buffer_get_size(l->staging.get());
    }
    return n_bytes;
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

void row_mover::move(const uint32_t * cells, uint8_t * const * hosts, size_t n, bool to_host) {
    const bool fails = fail_move_in > 0 && --fail_move_in == 0;
    n = fails ? n/2 : n;
    for (const auto & row : direct) {
        auto * base = static_cast<uint8_t *>(row.tensor->data);
        for (size_t i = 0; i < n; ++i) {
            uint8_t * cell = base + cells[i]*row.tensor->nb[1];
            uint8_t * host = hosts[i] + row.offset;
            std::memcpy(to_host ? host : cell, to_host ? cell : host, row.row_bytes);
        }
    }
    for (const auto & row : one_by_one) {
        for (size_t i = 0; i < n; ++i) {
            if (to_host) {
                ggml_backend_tensor_get(row.tensor, hosts[i] + row.offset, cells[i]*row.tensor->nb[1], row.row_bytes);
            } else {
                ggml_backend_tensor_set(row.tensor, hosts[i] + row.offset, cells[i]*row.tensor->nb[1], row.row_bytes);
            }
        }
    }
    for (auto & l : lanes) {
        for (size_t begin = 0; begin < n; begin += STAGING_ROWS) {
            l->move(cells + begin, hosts + begin, std::min(STAGING_ROWS, n - begin), to_host);
        }
    }
    if (fails) {
        throw error(ASRKF_MOVE_FAILED, "this move was to fail");
    }
}

void row_mover::get(const uint32_t * cells, uint8_t * const * hosts, size_t n) { move(cells, hosts, n, true); }

void row_mover::set(const uint32_t * cells, const uint8_t * const * hosts, size_t n) {
    // one walk serves both directions; to the device, the host side is only read
    move(cells, const_cast<uint8_t * const *>(hosts), n, false);
}

} // namespace asrkf
