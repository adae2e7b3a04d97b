// Relevance: two launches a layer. The first finds, for each query of each head, the sum of its softmax over all rows (and the part
// that falls on frozen ones); the second reads the index again and folds the probabilities over queries and heads, so logits are
// never stored. The index is in 4 bits: reading it twice moves less than writing 4 bytes for each row, head and query.
// A thread has a row, the block's queries lie in shared memory, and all sums have a fixed order: the same bits every time.
#include "cuda/device.h"

namespace asrkf::cuda {

namespace {

constexpr uint32_t THREADS    = 128;
constexpr uint32_t BATCH      = 8;           // queries that a thread multiplies its row with at a time
constexpr uint32_t CHUNK_ROWS = 4*THREADS;   // of a block of the first launch

// A softmax's sum relative to its highest logit so far, and the frozen rows' part of it.
struct total {
    float top, sum, frozen;
    __device__ total shuffled(uint32_t distance) const {
        const auto other = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, int(distance)); };
        return { other(top), other(sum), other(frozen) };
    }
};

constexpr float NONE = -INFINITY; // the logit of a row that a query does not see

__device__ __forceinline__ float rescale(float top, float new_top) { return top == NONE ? 0.0f : expf(top - new_top); }

__device__ __forceinline__ total joined(const total & a, const total & b) {
    const float top = larger(a.top, b.top), keep_a = rescale(a.top, top), keep_b = rescale(b.top, top);
    return { top, a.sum*keep_a + b.sum*keep_b, a.frozen*keep_a + b.frozen*keep_b };
}

struct workspace { // parts of the scratch memory
    total * partial; // [n_chunks, n_head, n_queries]
    total * totals;  // [n_head, n_queries]
};

__host__ __device__ __forceinline__ uint32_t chunks_of(uint32_t n_rows) { return (n_rows + CHUNK_ROWS - 1) / CHUNK_ROWS; }

__device__ __forceinline__ workspace workspace_of(const relevance_layer & l) {
    auto * totals = static_cast<total *>(l.scratch);
    return { totals + size_t(l.n_head)*l.n_queries, totals };
}

__device__ __forceinline__ float half_at(const uint8_t * p) { return __half2float(__ushort_as_half(*reinterpret_cast<const uint16_t *>(p))); }

// `n` elements of a row from element `at` on: n = 16, or the 32 of a block. Rows begin at any even address.
template <row_type type> struct row_reader;

template <> struct row_reader<row_type::f16> {
    static constexpr uint32_t n = 16;
    static __host__ __device__ size_t bytes(uint32_t head) { return head*2; }
    static __device__ __forceinline__ void read(const uint8_t * row, uint32_t at, float * out) {
        for (uint32_t i = 0; i < n; ++i) {
            out[i] = half_at(row + (at + i)*2);
        }
    }
};

template <> struct row_reader<row_type::q8_0> {
    static constexpr uint32_t n = 32;
    static __host__ __device__ size_t bytes(uint32_t head) { return head/32*34; }
    static __device__ __forceinline__ void read(const uint8_t * row, uint32_t at, float * out) {
        const uint8_t * block = row + at/32*34;
        const float scale = half_at(block);
        for (uint32_t i = 0; i < n; i += 2) {
            const uint32_t pair = *reinterpret_cast<const uint16_t *>(block + 2 + i);
            out[i]     = scale*float(int8_t(pair & 0xff));
            out[i + 1] = scale*float(int8_t(pair >> 8));
        }
    }
};

template <> struct row_reader<row_type::q4_0> {
    static constexpr uint32_t n = 32;
    static __host__ __device__ size_t bytes(uint32_t head) { return head/32*18; }
    static __device__ __forceinline__ void read(const uint8_t * row, uint32_t at, float * out) {
        const uint8_t * block = row + at/32*18;
        const float scale = half_at(block);
        for (uint32_t i = 0; i < n/2; i += 2) { // low halves are the first 16 elements, high ones the others
            const uint32_t pair = *reinterpret_cast<const uint16_t *>(block + 2 + i);
            out[i]          = scale*(float(pair       & 15) - 8.0f);
            out[i + 1]      = scale*(float(pair >> 8  & 15) - 8.0f);
            out[i + n/2]    = scale*(float(pair >> 4  & 15) - 8.0f);
            out[i + n/2+1]  = scale*(float(pair >> 12 & 15) - 8.0f);
        }
    }
};

// BATCH queries of one KV head from number `first` on, into shared memory. Numbers go through a head's queries, then to the next.
__device__ __forceinline__ void load_queries(const relevance_layer & l, uint32_t kv, uint32_t first, uint32_t n_of_kv, float * shared) {
    const uint32_t n = (n_of_kv - first < BATCH ? n_of_kv - first : BATCH)*l.head;
    __syncthreads(); // all are done with those before
    for (uint32_t i = threadIdx.x; i < BATCH*l.head; i += THREADS) {
        const uint32_t q = first + i/l.head, h = kv*(l.n_head/l.n_head_kv) + q/l.n_queries;
        shared[i] = i < n ? l.ring[(size_t(l.scoring[q % l.n_queries])*l.n_head + h)*l.head + i % l.head] : 0.0f;
    }
    __syncthreads();
}

// A row times BATCH queries; for attention the logits, for magnitudes the scores.
template <row_type type> __device__ __forceinline__ void multiply(const relevance_layer & l, uint32_t kv, uint32_t row, uint32_t first, const float * queries, float * out) {
    using reader = row_reader<type>;
    const uint8_t * bytes = static_cast<const uint8_t *>(l.index) + kv*l.head_bytes + row*reader::bytes(l.head);
    for (uint32_t q = 0; q < BATCH; ++q) {
        out[q] = 0;
    }
    for (uint32_t at = 0; at < l.head; at += reader::n) {
        float k[reader::n];
        reader::read(bytes, at, k);
#pragma unroll
        for (uint32_t q = 0; q < BATCH; ++q) {
#pragma unroll
            for (uint32_t i = 0; i < reader::n; ++i) {
                out[q] += queries[q*l.head + at + i]*k[i];
            }
        }
    }
#pragma unroll
    for (uint32_t q = 0; q < BATCH; ++q) {
        float x = out[q]*l.scale;
        const float mask = l.mask ? l.mask[size_t((first + q) % l.n_queries)*l.n_rows + row] : l.magnitude ? 1.0f : 0.0f;
        if (l.magnitude) {
            x = fabsf(x)*mask;
        } else {
            x = (l.soft_cap > 0 ? l.soft_cap*tanhf(x / l.soft_cap) : x) + mask;
        }
        out[q] = x;
    }
}

// Block (chunk of rows, KV head). The last one of a KV head joins all chunks, in their order.
template <row_type type> __global__ void __launch_bounds__(THREADS) sum_rows(const relevance_layer l) {
    __shared__ float    queries[BATCH*MAX_HEAD];
    __shared__ total    parts[THREADS / WARP];
    __shared__ uint32_t is_last;
    const workspace work = workspace_of(l);
    const uint32_t  kv = blockIdx.y, n_of_kv = l.n_head/l.n_head_kv*l.n_queries, begin = blockIdx.x*CHUNK_ROWS;
    const uint32_t  end = l.n_rows - begin < CHUNK_ROWS ? l.n_rows : begin + CHUNK_ROWS;
    for (uint32_t first = 0; first < n_of_kv; first += BATCH) {
        load_queries(l, kv, first, n_of_kv, queries);
        total mine[BATCH];
        for (uint32_t q = 0; q < BATCH; ++q) {
            mine[q] = { NONE, 0, 0 };
        }
        for (uint32_t row = begin + threadIdx.x; row < end; row += THREADS) {
            float logits[BATCH];
            multiply<type>(l, kv, row, first, queries, logits);
            const float frozen = l.frozen ? l.frozen[row] : 0.0f;
#pragma unroll
            for (uint32_t q = 0; q < BATCH; ++q) {
                if (logits[q] != NONE) {
                    mine[q] = joined(mine[q], { logits[q], 1, frozen });
                }
            }
        }
#pragma unroll
        for (uint32_t q = 0; q < BATCH; ++q) {
            __syncthreads();
            const total all = reduce<THREADS>(mine[q], parts, joined);
            if (threadIdx.x == 0 && first + q < n_of_kv) {
                work.partial[size_t(blockIdx.x)*l.n_head*l.n_queries + kv*n_of_kv + first + q] = all;
            }
        }
    }
    if (threadIdx.x == 0) { // who wrote all of the block's results
        __threadfence();
        is_last = atomicAdd(l.finished + kv, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) {
        return;
    }
    __threadfence();
    for (uint32_t q = threadIdx.x; q < n_of_kv; q += THREADS) {
        total all = { NONE, 0, 0 };
        for (uint32_t chunk = 0; chunk < gridDim.x; ++chunk) {
            all = joined(all, work.partial[size_t(chunk)*l.n_head*l.n_queries + kv*n_of_kv + q]);
        }
        work.totals[kv*n_of_kv + q] = all;
    }
    if (threadIdx.x == 0) {
        l.finished[kv] = 0; // for the next launch
    }
}

// Missed attention, by one block: a thread has a head.
__device__ __forceinline__ void fold_missed(const relevance_layer & l, const total * totals) {
    for (uint32_t h = threadIdx.x; h < l.n_head; h += THREADS) {
        float of_head = 0;
        for (uint32_t q = 0; q < l.n_queries; ++q) {
            const total & t = totals[h*l.n_queries + q];
            of_head += t.top == NONE ? 0.0f : t.frozen / t.sum;
        }
        l.missed[h] = of_head / float(l.n_queries);
    }
}

template <row_type type> __global__ void __launch_bounds__(THREADS) fold_rows(const relevance_layer l) {
    __shared__ float queries[BATCH*MAX_HEAD];
    const total *  totals = workspace_of(l).totals;
    const uint32_t row = blockIdx.x*THREADS + threadIdx.x, n_of_kv = l.n_head/l.n_head_kv*l.n_queries;
    float sum = 0, peak = 0;
    for (uint32_t kv = 0; kv < l.n_head_kv; ++kv) {
        float of_head = 0; // over a head's queries, which may lie in two batches
        for (uint32_t first = 0; first < n_of_kv; first += BATCH) {
            load_queries(l, kv, first, n_of_kv, queries);
            float x[BATCH];
            multiply<type>(l, kv, row < l.n_rows ? row : l.n_rows - 1, first, queries, x);
            for (uint32_t q = 0; q < BATCH && first + q < n_of_kv; ++q) {
                float p = x[q];
                if (!l.magnitude) {
                    const total t = totals[kv*n_of_kv + first + q];
                    p = t.top == NONE ? 0.0f : expf(p - t.top) / t.sum;
                }
                of_head += p;
                if (l.prompt_end) {
                    peak = larger(peak, p);
                }
                if ((first + q + 1) % l.n_queries == 0) {
                    sum += of_head;
                    if (!l.prompt_end) {
                        peak = larger(peak, of_head / float(l.n_queries));
                    }
                    of_head = 0;
                }
            }
        }
    }
    if (row < l.n_rows) {
        sum /= float(l.n_queries)*float(l.n_head)*float(l.n_layers);
        l.mean[row] = l.is_first ? sum : l.mean[row] + sum;
        l.peak[row] = l.is_first ? peak : larger(l.peak[row], peak);
    }
    if (l.missed && blockIdx.x == 0) {
        fold_missed(l, totals);
    }
}

template <row_type type> failure queue(const relevance_layer & l, cudaStream_t stream) {
    if (!l.magnitude) {
        if (failure why = launch(sum_rows<type>, dim3(chunks_of(l.n_rows), l.n_head_kv, 1), THREADS, stream, l)) {
            return why;
        }
    }
    return launch(fold_rows<type>, dim3((l.n_rows + THREADS - 1) / THREADS, 1, 1), THREADS, stream, l);
}

} // namespace

size_t relevance_scratch_bytes(uint32_t n_head, uint32_t n_rows, uint32_t n_queries) {
    return size_t(chunks_of(n_rows) + 1)*n_head*n_queries*sizeof(total);
}

failure refuses_heads(row_type type, uint32_t head, uint32_t n_head, uint32_t n_head_kv) {
    const uint32_t block = type == row_type::f16 ? 16 : 32;
    if (head == 0 || head > MAX_HEAD || head % block != 0) {
        return "heads of more than 256 elements, or no multiple of 16 (32 in a quantised index)";
    }
    if (n_head_kv == 0 || n_head % n_head_kv != 0 || n_head_kv > 65535) {
        return "query heads that KV heads do not divide";
    }
    return nullptr;
}

failure lacks_kernel(row_type type) {
    switch (type) {
        case row_type::f16:  return is_missing(sum_rows<row_type::f16>);
        case row_type::q8_0: return is_missing(sum_rows<row_type::q8_0>);
        case row_type::q4_0: return is_missing(sum_rows<row_type::q4_0>);
    }
    return "an index type without a kernel";
}

failure add_relevance(const relevance_layer & l, cudaStream_t stream) {
    if (failure why = refuses_heads(l.type, l.head, l.n_head, l.n_head_kv)) {
        return why;
    }
    if (l.n_queries == 0 || l.n_rows == 0 || l.n_layers == 0) {
        return "nothing to score";
    }
    if (l.magnitude && l.frozen) {
        return "magnitudes have no share that is missed";
    }
    if ((l.frozen == nullptr) != (l.missed == nullptr)) {
        return "missed attention needs both its rows and a place for the result";
    }
    switch (l.type) {
        case row_type::f16:  return queue<row_type::f16>(l, stream);
        case row_type::q8_0: return queue<row_type::q8_0>(l, stream);
        case row_type::q4_0: return queue<row_type::q4_0>(l, stream);
    }
    return "an index type without a kernel";
}

} // namespace asrkf::cuda
