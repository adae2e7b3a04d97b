#include "llama/pool_choice.h"

#include "llama/creation.h"
#include "llama/engine.h"
#include "llama/gate_scores.h"
#include "llama/layout.h"
#include "llama/prompt_cut.h"
#include "llama/scores.h"
#include "scoring/relevance.h"
#include "store/host_memory.h"
#include "store/row_mover.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstdio>
#include <optional>
#include <utility>

namespace asrkf {

namespace {

// Kept free for what no buffer shows: a device's context, its libraries' workspace, other programs.
uint64_t margin_of(uint64_t total_bytes) { return std::max<uint64_t>(512ull << 20, total_bytes/16); }

thread_local uint64_t pretended_bytes = 0;

bool pretends(const settings & config) { return config.no_alloc && pretended_bytes > 0; }

std::string human(uint64_t bytes) {
    const double mib = double(bytes)/(1 << 20);
    return mib < 1024 ? format("%.1f MiB", mib) : format("%.2f GiB", mib/1024);
}

ggml_backend_dev_t cpu_device() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

ggml_backend_dev_t device_of(const settings & config, uint32_t il) { return config.cparams.offload_kqv ? config.model.dev_layer(int(il)) : cpu_device(); }

ggml_backend_dev_t owner_of(ggml_backend_buffer_type_t buft) { return ggml_backend_buft_is_host(buft) ? cpu_device() : ggml_backend_buft_get_device(buft); }

bool is_cpu(ggml_backend_dev_t dev) { return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU; }

//
// what a context takes
//

// The largest parts of a step's graph, of which the allocator lays one over the other: outputs; before them the masks, with the
// larger of a layer's feed-forward part and its attention.
uint64_t compute_estimate(const settings & config, const llama_memory_params & params, const layout & made, ggml_backend_dev_t dev) {
    const auto & hparams = config.model.hparams;
    const uint64_t n = std::min(config.n_ctx, config.n_ubatch), f32 = sizeof(float);
    uint64_t masks = 0, attention = 0, feed_forward = 0;
    ggml_init_params init = { 8*ggml_tensor_overhead(), nullptr, true };
    for (const group & g : made.groups) {
        masks += n*g.pool_cells/(config.unified ? 1 : config.n_seq_max)*sizeof(ggml_fp16_t);
        for (const uint32_t il : g.layers) {
            if (device_of(config, il) != dev) {
                continue;
            }
            ggml_context_ptr holder(ggml_init(init));
            ggml_context * ctx = holder.get();
            ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hparams.n_embd_head_k(il), int64_t(n), hparams.n_head(il));
            ggml_tensor * k = ggml_new_tensor_3d(ctx, params.type_k, hparams.n_embd_head_k(il), g.pool_cells, hparams.n_head_kv(il));
            ggml_tensor * v = ggml_new_tensor_3d(ctx, params.type_v, hparams.n_embd_head_v(il), g.pool_cells, hparams.n_head_kv(il));
            ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, g.pool_cells, int64_t(n));
            ggml_tensor * out  = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f);
            // a GPU that is not here would copy a layer's K and V to F16 when it reads a prompt; one that is here says so itself
            const bool copies = pretends(config) && is_cpu(dev) && ggml_is_quantized(params.type_k);
            const uint64_t copied = copies ? (ggml_nelements(k) + ggml_nelements(v))*sizeof(ggml_fp16_t) : 0;
            attention    = std::max<uint64_t>(attention, ggml_backend_buft_get_alloc_size(ggml_backend_dev_buffer_type(dev), out) + 2*ggml_nbytes(q) + copied);
            feed_forward = std::max<uint64_t>(feed_forward, 2*n*hparams.n_ff(il)*f32);
        }
    }
    const uint64_t hidden = 3*n*hparams.n_embd*f32;
    const uint64_t logits = config.model.dev_output() == dev ? std::min<uint64_t>(n, config.cparams.n_outputs_max)*config.model.vocab.n_tokens()*f32 : 0;
    return hidden + std::max(logits, masks + std::max(attention, feed_forward));
}

//
// what there is
//

struct room {
    ggml_backend_dev_t dev;           // nullptr: the bytes that were given, wherever they are
    uint64_t           total_bytes;   // with the model's weights, whether they are there yet or not
    uint64_t           weights_bytes;
    uint64_t           margin_bytes;
};

// By tensor: a mapped file's buffer also counts what was copied out of it.
uint64_t weights_on(const llama_model & model, ggml_backend_dev_t dev, bool only_mapped) {
    std::map<const ggml_tensor *, uint64_t> sizes; // a tied tensor has two names
    for (const auto & [name, tensor] : model.tensors_by_name) {
        ggml_backend_buffer_type_t buft = tensor->buffer ? ggml_backend_buffer_get_type(tensor->buffer) : nullptr;
        const bool mapped = buft && std::string(ggml_backend_buft_name(buft)).find("Mapped") != std::string::npos;
        if (buft && owner_of(buft) == dev && (mapped || !only_mapped)) {
            sizes[tensor] = ggml_backend_buft_get_alloc_size(buft, tensor);
        }
    }
    uint64_t sum = 0;
    for (const auto & [tensor, bytes] : sizes) {
        sum += bytes;
    }
    return sum;
}

// A trial comes before the weights are loaded, a context after: both see the same room. Mapped files lie in RAM that counts as
// available.
room room_on(const settings & config, ggml_backend_dev_t dev, bool limited) {
    const uint64_t weights = weights_on(config.model, dev, false);
    const uint64_t to_come = config.no_alloc ? weights : is_cpu(dev) ? weights_on(config.model, dev, true) : 0;
    room r = { dev, pretends(config) ? pretended_bytes : free_bytes(dev) + weights - to_come, weights, 0 };
    if (limited && config.device_limit) {
        r.total_bytes = std::min<uint64_t>(r.total_bytes, config.device_limit);
    } else if (r.total_bytes == weights - to_come) {
        throw error(ASRKF_UNSUPPORTED, format("pool=auto: %s does not say how much memory it has free: set kv_pool, or device_limit=8GiB", ggml_backend_dev_name(dev)));
    }
    r.margin_bytes = margin_of(r.total_bytes);
    return r;
}

// Rooms, and whether a context fits them.
struct rooms {
    std::vector<room>   all;
    std::optional<room> ram; // where frozen tokens lie in the RAM that also holds layers of the pool: nothing is saved there

    rooms(const settings & asked, const bytes_by_device & devices) {
        if (!has_auto_pool(asked)) {
            return;
        }
        for (const auto & [dev, bytes] : devices) {
            all.push_back(room_on(asked, dev, true));
            if (is_cpu(dev) && !pretends(asked)) {
                ram = room_on(asked, dev, false);
            }
        }
    }
};

uint64_t kv_bytes_of(const settings & config, const llama_memory_params & params, const group & g, uint32_t il) {
    const auto & hparams = config.model.hparams;
    return uint64_t(g.pool_cells)*(ggml_row_size(params.type_k, hparams.n_embd_k_gqa(il)) + ggml_row_size(params.type_v, hparams.n_embd_v_gqa(il)));
}

constexpr uint32_t MEAN_STEP_CELLS = 8; // of a mean over layers, which have whole units each

// What types=auto takes, of K and V, where all tokens in F16 do not fit: the first that holds all, else the last. V bears five bits where K
// does not: docs/results.md, "Fewer bits or fewer tokens". A CPU is slower over them, and a pool saves it no RAM: there it is Q8_0.
constexpr std::pair<ggml_type, ggml_type> SMALLER_TYPES[] = { { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 }, { GGML_TYPE_Q8_0, GGML_TYPE_Q5_0 } };

std::string names_of(const llama_memory_params & types) {
    const char * k = ggml_type_name(types.type_k), * v = ggml_type_name(types.type_v);
    return types.type_k == types.type_v ? k : format("%s and %s", k, v);
}

class chooser {
public:
    chooser(const settings & asked, const llama_memory_params & params)
        : asked(asked), params(params), unit_cells(asked.unified ? POOL_PAD_CELLS : POOL_PAD_CELLS*asked.n_seq_max),
          step_cells(has_mean_pool(asked) ? MEAN_STEP_CELLS : unit_cells),
          least_cells((least_pool(asked) + unit_cells - 1)/unit_cells*unit_cells), there(asked, bytes_at(params, asked.n_ctx)) {
        const cached_layers cached = layers_with_cache(asked, params);
        for (const uint32_t il : cached.plain) {
            f16_bytes += uint64_t(asked.n_ctx)*(asked.model.hparams.n_embd_k_gqa(il) + asked.model.hparams.n_embd_v_gqa(il))*sizeof(ggml_fp16_t);
        }
        if (asked.pool_f16_percent > 0) {
            given_bytes = uint64_t(double(f16_bytes)*double(asked.pool_f16_percent)/100);
        } else {
            given_bytes = asked.pool_bytes;
        }
    }

    pool_choice choose() const;

private:
    asrkf_config with_cells(uint32_t cells) const {
        asrkf_config sized = asked;
        sized.pool_bytes = 0, sized.pool_f16_percent = 0, sized.types = TYPES_GIVEN;
        sized.pool_cells = cells;
        return sized;
    }
    bytes_by_device bytes_at(const llama_memory_params & types, uint32_t cells) const { return bytes_of(settings(asked.model, asked.cparams, with_cells(cells)), types); }
    // over the layers: their groups get whole units of them, so it may be a little less
    uint32_t mean_cells(const llama_memory_params & types, uint32_t cells) const {
        uint64_t sum = 0, n = 0;
        const layout made = make_layout(settings(asked.model, asked.cparams, with_cells(cells)), types);
        for (const group & g : made.groups) {
            sum += g.keeps_window ? 0 : uint64_t(g.pool_cells)*g.layers.size();
            n   += g.keeps_window ? 0 : g.layers.size();
        }
        return uint32_t((sum + n - 1)/n);
    }
    // A part of the full F16 cache is one of the layers that the policy serves: what sliding windows take comes on top.
    uint64_t beside_pool(const llama_memory_params & types, uint32_t cells) const;
    uint64_t shortage(const llama_memory_params & types, uint32_t cells) const;
    uint32_t most_cells(const llama_memory_params & types) const;
    llama_memory_params typed(ggml_type type_k, ggml_type type_v) const {
        llama_memory_params other = params;
        other.type_k = type_k;
        other.type_v = type_v;
        return other;
    }
    std::string why_not(const llama_memory_params & types) const;
    bool is_on_cpu() const {
        const bytes_by_device devices = bytes_at(params, least_cells);
        return !pretends(asked) && std::all_of(devices.begin(), devices.end(), [](const auto & one) { return is_cpu(one.first); });
    }
    std::string reason(const llama_memory_params & types, uint32_t cells) const;
    [[noreturn]] void refuse_all(const llama_memory_params & types) const;

    const settings &            asked;
    const llama_memory_params & params;
    const uint32_t              unit_cells, step_cells, least_cells;
    const rooms                 there;
    uint64_t                    f16_bytes = 0, given_bytes = 0;
};

uint64_t chooser::beside_pool(const llama_memory_params & types, uint32_t cells) const {
    uint64_t n_bytes = 0;
    if (asked.pool_f16_percent > 0) {
        const settings sized(asked.model, asked.cparams, with_cells(cells));
        for (const group & g : make_layout(sized, types).groups) {
            for (const uint32_t il : g.layers) {
                n_bytes += g.keeps_window ? kv_bytes_of(sized, types, g, il) : 0;
            }
        }
    }
    return n_bytes;
}

// Bytes that are missing, 0 if it fits.
uint64_t chooser::shortage(const llama_memory_params & types, uint32_t cells) const {
    const bytes_by_device needed = bytes_at(types, cells);
    const auto missing = [](uint64_t need, uint64_t have) { return need > have ? need - have : 0; };
    uint64_t cache = 0, most = 0;
    for (const auto & [dev, bytes] : needed) {
        cache += bytes.cache_bytes();
    }
    const bytes_by_device whole = there.all.empty() ? bytes_by_device() : bytes_at(types, asked.n_ctx);
    for (const room & r : there.all) {
        const bytes_on_device & b = needed.at(r.dev);
        const bool is_staged = !is_cpu(r.dev) || pretends(asked) || moves_kind(asked.moves) == MOVES_STAGED;
        const uint64_t staging = is_staged ? STAGING_ROWS*whole.at(r.dev).kv_bytes/asked.n_ctx : 0;
        most = std::max(most, missing(r.weights_bytes + r.margin_bytes + b.cache_bytes() + b.compute_bytes + staging, r.total_bytes));
    }
    if (there.ram && cells < asked.n_ctx) { // every token's rows are in RAM, in the pool or frozen
        const bytes_on_device & b = needed.at(there.ram->dev);
        uint64_t all = 0;
        for (const auto & [dev, bytes] : whole) {
            all += bytes.kv_bytes;
        }
        most = std::max(most, missing(there.ram->weights_bytes + there.ram->margin_bytes + all + b.index_bytes + b.compute_bytes, there.ram->total_bytes));
    }
    return there.all.empty() ? missing(cache, given_bytes + beside_pool(types, cells)) : most;
}

// The largest pool that fits, all of n_ctx at most; 0: none.
uint32_t chooser::most_cells(const llama_memory_params & types) const {
    if (shortage(types, asked.n_ctx) == 0) {
        return asked.n_ctx;
    }
    uint32_t fits = 0, n_steps = asked.n_ctx/step_cells;
    for (uint32_t jump = 1u << 20; jump > 0; jump /= 2) { // what is too small for a pool is taken to fit on the way
        const uint32_t cells = (fits + jump)*step_cells;
        if (fits + jump < n_steps && (cells < least_cells || shortage(types, cells) == 0)) {
            fits += jump;
        }
    }
    return fits*step_cells >= least_cells ? fits*step_cells : 0;
}

// "" if the cache may have these types.
std::string chooser::why_not(const llama_memory_params & types) const {
    try {
        layers_with_cache(asked, types);
        return "";
    } catch (const error & e) {
        return e.what();
    }
}

std::string chooser::reason(const llama_memory_params & types, uint32_t cells) const {
    uint64_t cache = 0, all = 0;
    std::string where;
    const bytes_by_device needed = bytes_at(types, cells);
    for (const auto & [dev, bytes] : needed) {
        cache += bytes.cache_bytes();
    }
    for (const room & r : there.all) {
        where += format("; %s has %s, weights take %s, compute buffers about %s (estimate), %s stay free", ggml_backend_dev_name(r.dev), human(r.total_bytes).c_str(),
                human(r.weights_bytes).c_str(), human(needed.at(r.dev).compute_bytes).c_str(), human(r.margin_bytes).c_str());
    }
    for (const auto & [dev, bytes] : bytes_at(types, asked.n_ctx)) {
        all += bytes.kv_bytes;
    }
    const uint64_t windows = beside_pool(types, cells);
    std::string text = format("%s of K, V and index%s", human(cache - windows).c_str(), where.c_str());
    if (there.all.empty()) {
        text += format(" of %s given", human(given_bytes).c_str());
    }
    if (windows > 0) {
        text += format(", and %s of sliding windows", human(windows).c_str());
    }
    if (cells < asked.n_ctx) {
        const uint64_t free = free_bytes(cpu_device());
        text += format("; frozen tokens take up to %s of RAM, %s are available%s", human(all).c_str(), human(free).c_str(), all > free ? ": a full context will not fit" : "");
    }
    return text;
}

void chooser::refuse_all(const llama_memory_params & types) const {
    const bytes_by_device needed = bytes_at(types, least_cells);
    const uint64_t missing = shortage(types, least_cells);
    if (there.all.empty()) {
        throw error(ASRKF_INVALID_ARGUMENT, format("pool of %llu bytes holds no index and %u cells: raise kv_pool to at least %llu bytes",
                (unsigned long long) given_bytes, least_cells, (unsigned long long) (given_bytes + beside_pool(types, least_cells) + missing)));
    }
    throw error(ASRKF_POOL_FULL, format("pool=auto: the smallest pool, %u of %u cells in %s, does not fit, %s are missing (%s): lower n_ctx, n_gpu_layers or n_ubatch, take a smaller "
            "cache type, or set kv_pool%s", least_cells, asked.n_ctx, names_of(types).c_str(), human(missing).c_str(), reason(types, least_cells).c_str(),
            there.ram && !asked.device_limit ? "; on a CPU frozen tokens lie in the same RAM as the pool, so a smaller one saves none" : ""));
}

pool_choice chooser::choose() const {
    std::vector<llama_memory_params> candidates = { params };
    std::string note;
    if (asked.types == TYPES_AUTO) {
        candidates = { typed(GGML_TYPE_F16, GGML_TYPE_F16) };
        for (const auto & [type_k, type_v] : SMALLER_TYPES) {
            const llama_memory_params smaller = typed(type_k, type_v);
            if (type_k != type_v && is_on_cpu()) {
                break;
            }
            if (const std::string no = why_not(smaller); !no.empty()) {
                note = "; not " + names_of(smaller) + ": " + no;
                break;
            }
            candidates.push_back(smaller);
        }
    }
    pool_choice chosen = { asked, candidates.back(), "" };
    uint32_t cells = 0;
    for (const llama_memory_params & types : candidates) {
        chosen.params = types;
        cells = most_cells(types);
        if (cells == asked.n_ctx) {
            break;
        }
    }
    if (cells == 0) {
        refuse_all(chosen.params);
    }
    if (cells == asked.n_ctx) {
        note.clear(); // smaller types would not have been taken
    }
    const ggml_type k = chosen.params.type_k, v = chosen.params.type_v;
    if (cells < asked.n_ctx && asked.types == TYPES_GIVEN && k != GGML_TYPE_Q8_0 && why_not(typed(GGML_TYPE_Q8_0, GGML_TYPE_Q8_0)).empty()) {
        const llama_memory_params small = typed(GGML_TYPE_Q8_0, GGML_TYPE_Q8_0);
        const uint32_t more = most_cells(small);
        note = format("; in q8_0 (-ctk q8_0 -ctv q8_0) it would have %u", more ? mean_cells(small, more) : 0);
    }
    chosen.text    = format("pool: %s%u %scells in %s%s, %s%s", cells < asked.n_ctx ? "" : "all ", mean_cells(chosen.params, cells), cells < asked.n_ctx ? format("of %u ", asked.n_ctx).c_str() : "",
            names_of(chosen.params).c_str(), cells < asked.n_ctx || make_policy_params(asked, 1).freezes_with_room() ? "" : ", nothing will be frozen", reason(chosen.params, cells).c_str(), note.c_str());
    chosen.is_less = cells < asked.n_ctx || k != params.type_k || v != params.type_v;
    chosen.config  = with_cells(cells);
    return chosen;
}

} // namespace

bytes_by_device bytes_of(const settings & config, const llama_memory_params & params) {
    const layout made = make_layout(config, params);
    bytes_by_device needed;
    for (const group & g : made.groups) {
        for (const uint32_t il : g.layers) {
            needed[device_of(config, il)].kv_bytes += kv_bytes_of(config, params, g, il);
        }
    }
    for (auto & [dev, bytes] : needed) {
        bytes.compute_bytes = compute_estimate(config, params, made, dev);
    }
    if (!made.scoring_layers.empty()) {
        std::vector<uint32_t> sets;
        const auto scorer = make_scorer(config, made.scoring_layers, [&](uint32_t il) { return made.group_of_layer[il]; }, sets, /*no_alloc*/ true);
        for (const auto & [buft, bytes] : scorer->breakdown()) {
            needed[owner_of(buft)].index_bytes += bytes;
        }
        for (const auto & [buft, bytes] : device_scorers(*scorer, largest_shapes(config), /*no_alloc*/ true).breakdown()) {
            needed[owner_of(buft)].compute_bytes += bytes;
        }
    }
    std::string ignored;
    if (const auto own = make_own_attention(config, made.groups, params.type_k, /*no_alloc*/ true, ignored)) {
        for (const auto & [buft, bytes] : own->kept_bytes()) {
            needed[owner_of(buft)].index_bytes += bytes;
        }
        for (const auto & [buft, bytes] : own->room_bytes()) {
            needed[owner_of(buft)].compute_bytes += bytes;
        }
    }
    if (make_policy_params(config, 1).cuts) {
        const auto rows = make_attention_rows(config, layers_with_cache(config, params).plain, params.type_k, /*no_alloc*/ true);
        for (const auto & [buft, bytes] : rows->ring_bytes()) {
            needed[owner_of(buft)].index_bytes += bytes;
        }
        for (const auto & [buft, bytes] : rows->room_bytes()) {
            needed[owner_of(buft)].compute_bytes += bytes;
        }
    }
    if (const auto computing = make_gates(config, made.groups, ggml_backend_cpu_buffer_type(), /*no_alloc*/ true)) {
        for (const auto & [buft, bytes] : computing->breakdown()) {
            needed[owner_of(buft)].index_bytes += bytes;
        }
    }
    return needed;
}

uint64_t free_bytes(ggml_backend_dev_t dev) {
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(dev, &free, &total);
    if (!is_cpu(dev)) {
        return free;
    }
    return std::min<uint64_t>(free, available_ram());
}

void pretend_free(uint64_t bytes) { pretended_bytes = bytes; }

std::vector<asrkf_device_memory> device_memory(llama_context * ctx) {
    std::vector<asrkf_device_memory> rows;
    for (const auto & [buft, data] : ctx->memory_breakdown()) {
        ggml_backend_dev_t dev = owner_of(buft);
        if (!dev) {
            continue;
        }
        const std::string name = ggml_backend_dev_name(dev);
        auto row = std::find_if(rows.begin(), rows.end(), [&](const asrkf_device_memory & r) { return name == r.name; });
        if (row == rows.end()) {
            const uint64_t free = free_bytes(dev);
            row = rows.insert(row, { sizeof(asrkf_device_memory), is_cpu(dev), 0, 0, 0, free, margin_of(pretended_bytes ? pretended_bytes : free), {} });
            std::snprintf(row->name, sizeof(row->name), "%s", name.c_str());
        }
        row->weights_bytes += data.model;
        row->cache_bytes   += data.context;
        row->compute_bytes += data.compute;
    }
    return rows;
}

pool_choice choose_pool(const settings & asked, const llama_memory_params & params) {
    if (!is_pool_of_bytes(asked)) {
        return { asked, params, "" };
    }
    return chooser(asked, params).choose();
}

void tell(const pool_choice & chosen, bool is_trial) {
    if (is_trial || chosen.text.empty()) {
        return;
    }
    if (chosen.is_less) {
        LLAMA_LOG_WARN("asrkf: %s\n", chosen.text.c_str());
    } else {
        LLAMA_LOG_INFO("asrkf: %s\n", chosen.text.c_str());
    }
}

} // namespace asrkf
