#include "scoring/gate_file.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>

namespace asrkf {

namespace {

[[noreturn]] void refuse_file(const std::string & path, const std::string & why) {
    throw error(ASRKF_INVALID_ARGUMENT, format("gates=%s: %s; make it with asrkf gates train MODEL, or name another file", path.c_str(), why.c_str()));
}

// Values of a GGUF file's header, each of the type that it must have.
class header {
public:
    header(const gguf_context * file, const std::string & path) : file(file), path(path) {}

    std::string text(const char * key) const { return gguf_get_val_str(file, find(key, GGUF_TYPE_STRING)); }
    uint32_t    number(const char * key) const { return gguf_get_val_u32(file, find(key, GGUF_TYPE_UINT32)); }
    float       real(const char * key) const { return gguf_get_val_f32(file, find(key, GGUF_TYPE_FLOAT32)); }
    std::vector<uint32_t> numbers(const char * key) const {
        const int64_t id = find(key, GGUF_TYPE_ARRAY);
        if (gguf_get_arr_type(file, id) != GGUF_TYPE_UINT32) {
            refuse_file(path, format("%s is of another type", key));
        }
        const auto * values = static_cast<const uint32_t *>(gguf_get_arr_data(file, id));
        return { values, values + gguf_get_arr_n(file, id) };
    }

private:
    int64_t find(const char * key, gguf_type type) const {
        const int64_t id = gguf_find_key(file, key);
        if (id < 0 || gguf_get_kv_type(file, id) != type) {
            refuse_file(path, format("it has no %s", key));
        }
        return id;
    }

    const gguf_context * file;
    const std::string &  path;
};

// A tensor of this shape; an extent of 0 may be any. type: GGML_TYPE_COUNT for any.
ggml_tensor * tensor_of(const gate_file & file, const std::string & name, ggml_type type, const std::vector<int64_t> & shape) {
    ggml_tensor * t = ggml_get_tensor(file.holder.get(), name.c_str());
    if (!t) {
        refuse_file(file.path, "it has no tensor " + name);
    }
    bool fits = type == GGML_TYPE_COUNT || t->type == type;
    for (size_t i = 0; i < GGML_MAX_DIMS; ++i) {
        const int64_t wanted = i < shape.size() ? shape[i] : 1;
        fits = fits && (wanted == 0 || t->ne[i] == wanted);
    }
    if (!fits) {
        refuse_file(file.path, name + " has another type or shape than its header says");
    }
    return t;
}

gate_tensors layer_of(const gate_file & file, uint32_t il) {
    const int64_t dim = file.dim;
    const auto tensor = [&](const char * name, ggml_type type, const std::vector<int64_t> & shape) {
        return tensor_of(file, format("blk.%u.%s", il, name), type, shape);
    };
    gate_tensors g = {};
    g.bias     = tensor("gate_bias", GGML_TYPE_F32, { 0, 0 });
    const int64_t n_group = g.bias->ne[0], n_head_kv = g.bias->ne[1];
    g.q_weight = tensor("gate_q.weight", GGML_TYPE_COUNT, { 0, n_head_kv*n_group*dim });
    g.k_weight = tensor("gate_k.weight", GGML_TYPE_COUNT, { g.q_weight->ne[0], n_head_kv*dim });
    g.q_bias   = tensor("gate_q.bias", GGML_TYPE_F32, { n_head_kv*n_group*dim });
    g.q_norm   = tensor("gate_q_norm.weight", GGML_TYPE_F32, { dim });
    g.k_norm   = tensor("gate_k_norm.weight", GGML_TYPE_F32, { dim });
    g.sinks    = tensor("gate_sinks", GGML_TYPE_F32, { dim, file.n_sinks, n_head_kv });
    return g;
}

} // namespace

gate_file read_gates(const std::string & path, bool no_alloc) {
    gate_file result;
    result.path = path;
    ggml_context * holder = nullptr;
    const gguf_context_ptr file(gguf_init_from_file(path.c_str(), { no_alloc, &holder }));
    result.holder.reset(holder);
    if (!file) {
        refuse_file(path, "it cannot be read as GGUF");
    }
    const header values(file.get(), path);
    if (values.text("general.architecture") != "asrkf-gates" || values.number("asrkf.gates.version") != 1) {
        refuse_file(path, "it has no gates of this version");
    }
    result.fingerprint = values.text("asrkf.gates.model");
    result.dim         = values.number("asrkf.gates.dim");
    result.n_sinks     = values.number("asrkf.gates.sinks");
    result.norm_eps    = values.real("asrkf.gates.norm_eps");
    result.layers      = values.numbers("asrkf.gates.layers");
    if (result.dim == 0 || result.n_sinks == 0 || !(result.norm_eps >= 0) || !std::isfinite(result.norm_eps) || result.layers.empty()
            || std::adjacent_find(result.layers.begin(), result.layers.end(), std::greater_equal<>()) != result.layers.end()) {
        refuse_file(path, "its header makes no sense");
    }
    for (const uint32_t il : result.layers) {
        result.tensors.push_back(layer_of(result, il));
    }
    return result;
}

} // namespace asrkf
