#include "policy/config.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace asrkf {

namespace {

enum field_kind { INTEGER, REAL, BYTES, CHOICE, TEXT, POOL };
const char * const kind_names[] = { "integer", "real", "bytes", "choice", "text", "pool" };

struct field {
    const char * name;
    field_kind   kind;
    size_t       offset;
    const char * choices;
    double       minimum;
    double       maximum;
    const char * doc;
};

const char * const policy_choices = "full|asrkf|paper|window|random|flag-all|refreekv|kvzip";

#define AT(member) offsetof(asrkf_config, member)
// The table. The Python dataclass and docs/policy.md are checked against it.
const field table[] = {
    { "pool", POOL, 0, "", 0, 0, "size of the pool: what fits the device (auto), cells (2048), part of n_ctx (0.25), bytes of K, V and index (512MiB), or so much of the bytes that a full F16 cache of the served layers takes (33%); with layers=each cells are a mean over the layers" },
    { "types", CHOICE, AT(types), "given|auto", 0, 0, "types of K and V: the context's (-ctk, -ctv), or the best that the pool's bytes have room for: all tokens in f16, else all in q8_0, else (on a GPU) all with V in q5_0, else a pool of the last" },
    { "layers", TEXT, AT(layers), "", 0, 0, "one set of active tokens for all layers (\"shared\"), two layer groups by sensitivity (\"two\"), one per layer (\"each\"), or groups with a pool each, \"0-8@512/9-29@1024\"" },
    { "calibration", TEXT, AT(calibration), "", 0, 0, "file of asrkf calibrate with the layers' sensitivities, or \"off\" for a guess by depth; without it the model's own from the cache folder" },
    { "gates", TEXT, AT(gates), "", 0, 0, "file of asrkf gates, for score=gate; without it the model's own from the cache folder" },
    { "sinks", INTEGER, AT(sinks), "", 0, 4096, "first positions that are never frozen" },
    { "window", INTEGER, AT(window), "", 0, 1 << 24, "most recent positions that are never frozen; 0: half of the pool" },
    { "interval", INTEGER, AT(interval), "", 1, 1024, "tokens between two decisions" },
    { "score", CHOICE, AT(score), "attention|magnitude|random|recency|none|gate", 0, 0, "relevance of a cell: attention probability, mean |q.k| (as published), a control, or what the layer's gate says of the token (needs asrkf gates, and no index)" },
    { "score_layers", TEXT, AT(score_layers), "", 0, 0, "layers that score for all groups, \"0-3+7\"; \"auto\": the calibration's, or by depth without one" },
    { "score_queries", INTEGER, AT(score_queries), "", 1, 64, "queries that score: of the newest steps, and from all over a long one" },
    { "index", CHOICE, AT(index), "auto|f16|q8_0|q4_0", 0, 0, "type of the scoring layers' K rows that stay on the device for all tokens; auto: q4_0 where it divides the head, else f16; f16 for mean_key" },
    { "ema", REAL, AT(ema), "", 0, 0.999, "weight of the old score after an interval" },
    { "hysteresis", REAL, AT(hysteresis), "", 0, 10, "an active token's score counts this much more (0.2: a fifth)" },
    { "ranking", CHOICE, AT(ranking), "shared|own", 0, 0, "who stays active in a layer group: what the scoring layers attend to (shared), or that times how much more the group's own layers attended to it, when they last had it (own); with recall" },
    { "recall", CHOICE, AT(recall), "off|exact|mean_key", 0, 0, "whether frozen tokens have fresh scores, and come back when a live query asks for them: by every token's key, or by the mean key of 16 tokens (a quarter of the index)" },
    { "recall_share", REAL, AT(recall_share), "", 0, 1, "part of the history's cells for the blocks of 16 that the newest queries score best, in every layer group" },
    { "recall_limit", INTEGER, AT(recall_limit), "", 1, 1 << 20, "most restores by recall, for each token that is decoded" },
    { "rewalk_tokens", INTEGER, AT(rewalk_tokens), "", 0, 512, "last tokens of a prompt that are computed again once the blocks they ask for are back; 0: none" },
    { "recovery", CHOICE, AT(recovery), "off|soft|window|full|second_look", 0, 0, "highest level of recovery that output entropy may start; or a second look: a token that missed much attention is computed once more, with what it asks for restored" },
    { "trigger", CHOICE, AT(trigger), "entropy|random", 0, 0, "what starts it; random: the control, at the same rate" },
    { "trigger_share", REAL, AT(trigger_share), "", 0, 0.5, "part of the outputs that may start it: how far out on the run's own entropies" },
    { "look_share", REAL, AT(look_share), "", 0, 0.5, "part of the tokens that second_look may compute once more, at most" },
    { "look_trigger", CHOICE, AT(look_trigger), "missed|entropy|random", 0, 0, "what starts a second look: missed attention; or for comparison the output's entropy, or nothing in particular, at the same share" },
    { "softness", REAL, AT(softness), "", 1e-3, 1e3, "k of the freeze timer floor(sqrt(c)/k), in decisions; c counts how often the token was found unimportant" },
    { "timer_share", REAL, AT(timer_share), "", 0, 0.5, "part of the pool for tokens that are back because their timer ended" },
    { "timer_grace", INTEGER, AT(timer_grace), "", 1, 1024, "decisions that such a token stays before it is judged again" },
    { "tau", REAL, AT(tau), "", 0, 1e9, "threshold of the paper preset: tokens that score less are flagged" },
    { "tolerance", REAL, AT(tolerance), "", 0, 1, "of refreekv: the part of the last query's attention norm that a cut may take from a layer" },
    { "rows", INTEGER, AT(rows), "", 1, 64, "of refreekv: the newest queries whose attention is averaged for it" },
    { "order", CHOICE, AT(order), "position|relevance", 0, 0, "of refreekv: who goes first: the oldest tokens, or those with the lowest scores" },
    { "repeat", INTEGER, AT(repeat), "", 0, 1 << 20, "of refreekv: tokens that are generated between two cuts; 0: where a prompt ends, and never again" },
    { "gate_threshold", REAL, AT(gate_threshold), "", 0, 1, "of kvzip: tokens whose gate says less are frozen even where the pool has room; 0: the best stay, as many as the pool holds" },
    { "block", INTEGER, AT(block), "", 8, 256, "positions in a block, the unit of sealing" },
    { "pinned", TEXT, AT(pinned), "", 0, 0, "position ranges that are never frozen, \"0-128+512-640\", ends excluded" },
    { "host_limit", BYTES, AT(host_limit), "", 0, 1e18, "most bytes of the host store (8GiB); 0: no limit" },
    { "device_limit", BYTES, AT(device_limit), "", 0, 1e18, "for pool=auto: most bytes on each device, weights and compute buffers among them (8GiB); 0: what is free" },
    { "moves", CHOICE, AT(moves), "auto|direct|staged", 0, 0, "how rows move: by memcpy (device memory is host memory) or gathered through a staging buffer; staged copies a block when it seals" },
    { "state", CHOICE, AT(state), "own|upstream", 0, 0, "what a saved state holds: all tokens, and scores and timers (own: loads here only), or llama.cpp's own format" },
    { "seed", INTEGER, AT(seed), "", 0, 4294967295.0, "of the random score" },
};
#undef AT

[[noreturn]] void invalid(const std::string & text) { throw error(ASRKF_INVALID_ARGUMENT, text); }

std::vector<std::string> split(const std::string & text, char separator) {
    std::vector<std::string> parts;
    size_t begin = 0;
    while (true) {
        const size_t end = text.find(separator, begin);
        parts.push_back(text.substr(begin, end == std::string::npos ? end : end - begin));
        if (end == std::string::npos) {
            return parts;
        }
        begin = end + 1;
    }
}

// Levenshtein distance, for "did you mean".
size_t distance(const std::string & a, const std::string & b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) {
        row[j] = j;
    }
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t above = row[j];
            row[j] = std::min({ above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]) });
            diagonal = above;
        }
    }
    return row[b.size()];
}

std::string nearest(const std::string & word, const std::vector<std::string> & known) {
    return *std::min_element(known.begin(), known.end(), [&](const std::string & a, const std::string & b) {
        return distance(word, a) < distance(word, b);
    });
}

std::string joined(std::vector<std::string> words) {
    std::string text;
    for (const auto & word : words) {
        text += (text.empty() ? "" : ", ") + word;
    }
    return text;
}

int32_t parse_choice(const char * what, const std::string & value, const char * choices) {
    const auto known = split(choices, '|');
    for (size_t i = 0; i < known.size(); ++i) {
        if (known[i] == value) {
            return int32_t(i);
        }
    }
    invalid(format("%s \"%s\" is unknown; did you mean \"%s\"? (known: %s)", what, value.c_str(),
            nearest(value, known).c_str(), joined(known).c_str()));
}

double parse_number(const char * key, const std::string & value, std::string * out_suffix = nullptr) {
    const char * begin = value.c_str();
    char * end = nullptr;
    errno = 0;
    const double number = std::strtod(begin, &end);
    if (end == begin || errno == ERANGE || !std::isfinite(number)) {
        invalid(format("%s=%s is not a number", key, value.c_str()));
    }
    if (out_suffix) {
        *out_suffix = end;
    } else if (*end) {
        invalid(format("%s=%s is not a number", key, value.c_str()));
    }
    return number;
}

double unit_bytes(const char * key, const std::string & value, const std::string & suffix) {
    static const std::pair<const char *, double> units[] = {
        { "B", 1 }, { "KiB", 1024. }, { "MiB", 1048576. }, { "GiB", 1073741824. }, { "TiB", 1099511627776. },
        { "kB", 1e3 }, { "MB", 1e6 }, { "GB", 1e9 }, { "TB", 1e12 },
    };
    for (const auto & unit : units) {
        if (suffix == unit.first) {
            return unit.second;
        }
    }
    invalid(format("%s=%s has an unknown unit; use B, KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000)", key, value.c_str()));
}

void check_range(const field & f, double value, const std::string & shown) {
    if (value < f.minimum || value > f.maximum) {
        invalid(format("%s=%s is out of range [%.10g, %.10g]", f.name, shown.c_str(), f.minimum, f.maximum));
    }
}

template <typename T> T & at(asrkf_config & c, const field & f) { return *reinterpret_cast<T *>(reinterpret_cast<char *>(&c) + f.offset); }
template <typename T> const T & at(const asrkf_config & c, const field & f) { return *reinterpret_cast<const T *>(reinterpret_cast<const char *>(&c) + f.offset); }

constexpr size_t TEXT_BYTES = sizeof(asrkf_config::layers);

void set_pool(asrkf_config & config, const std::string & value) {
    config.pool_cells       = 0;
    config.pool_ratio       = 0;
    config.pool_bytes       = 0;
    config.pool_f16_percent = 0;
    if (value == "auto") {
        return;
    }
    std::string suffix;
    const double number = parse_number("pool", value, &suffix);
    if (!(number > 0)) {
        invalid(format("pool=%s must be positive: cells (2048), part of n_ctx (0.25) or bytes (512MiB)", value.c_str()));
    }
    if (suffix == "%") {
        if (number > 100 || !(float(number) > 0)) {
            invalid(format("pool=%s: at most 100%% of the bytes of a full F16 cache", value.c_str()));
        }
        config.pool_f16_percent = float(number);
    } else if (!suffix.empty()) {
        const double n_bytes = number * unit_bytes("pool", value, suffix);
        if (n_bytes < 1 || n_bytes > 1e18) {
            invalid(format("pool=%s is out of range", value.c_str()));
        }
        config.pool_bytes = uint64_t(n_bytes);
    } else if (value.find_first_of(".eE") != std::string::npos) {
        if (number > 1) {
            invalid(format("pool=%s: a fraction of n_ctx is at most 1.0; write cells without a point", value.c_str()));
        }
        config.pool_ratio = float(number);
        if (!(config.pool_ratio > 0)) {
            invalid(format("pool=%s is out of range", value.c_str()));
        }
    } else {
        if (number != std::floor(number) || number > double(1 << 30)) {
            invalid(format("pool=%s is out of range", value.c_str()));
        }
        config.pool_cells = uint32_t(number);
    }
}

void set_field(asrkf_config & config, const field & f, const std::string & value) {
    switch (f.kind) {
        case POOL:
            set_pool(config, value);
            break;
        case INTEGER: {
            const double number = parse_number(f.name, value);
            if (number != std::floor(number)) {
                invalid(format("%s=%s is not a whole number", f.name, value.c_str()));
            }
            check_range(f, number, value);
            at<uint32_t>(config, f) = uint32_t(number);
        } break;
        case REAL: {
            const double number = parse_number(f.name, value);
            check_range(f, number, value);
            at<float>(config, f) = float(number);
        } break;
        case BYTES: {
            std::string suffix;
            const double number = parse_number(f.name, value, &suffix);
            const double n_bytes = number * (suffix.empty() ? 1 : unit_bytes(f.name, value, suffix));
            check_range(f, n_bytes, value);
            at<uint64_t>(config, f) = uint64_t(n_bytes);
        } break;
        case CHOICE:
            at<int32_t>(config, f) = parse_choice(f.name, value, f.choices);
            break;
        case TEXT:
            if (value.size() >= TEXT_BYTES) {
                invalid(format("%s is longer than %zu characters", f.name, TEXT_BYTES - 1));
            }
            std::memset(&at<char>(config, f), 0, TEXT_BYTES);
            std::memcpy(&at<char>(config, f), value.data(), value.size());
            break;
    }
}

// The fewest digits that read back as the same float.
std::string shortest(float value) {
    std::string text;
    for (int digits = 1; digits <= 9; ++digits) {
        text = format("%.*g", digits, double(value));
        if (std::strtof(text.c_str(), nullptr) == value) {
            break;
        }
    }
    return text;
}

void set_text(char (&out)[TEXT_BYTES], const char * value) { std::snprintf(out, sizeof(out), "%s", value); }

ranges parse_ranges(const char * key, const std::string & text, bool end_excluded) {
    ranges result;
    if (text.empty()) {
        return result;
    }
    for (const auto & part : split(text, '+')) {
        const auto ends = split(part, '-');
        if (ends.size() > 2 || (end_excluded && ends.size() != 2)) {
            invalid(format("%s: \"%s\" is not a range; write %s", key, part.c_str(), end_excluded ? "\"0-128+512-640\"" : "\"0-3+7\""));
        }
        int32_t values[2] = { 0, 0 };
        for (size_t i = 0; i < ends.size(); ++i) {
            if (ends[i].empty() || ends[i].find_first_not_of("0123456789") != std::string::npos || ends[i].size() > 9) {
                invalid(format("%s: \"%s\" is not a range", key, part.c_str()));
            }
            values[i] = int32_t(std::atol(ends[i].c_str()));
        }
        if (ends.size() == 1) {
            values[1] = values[0];
        }
        if (values[1] < values[0] || (end_excluded && values[1] == values[0])) {
            invalid(format("%s: \"%s\" is an empty range", key, part.c_str()));
        }
        result.emplace_back(values[0], values[1]);
    }
    return result;
}

} // namespace

const char * policy_name(int32_t policy) {
    static const std::vector<std::string> names = split(policy_choices, '|');
    return policy >= 0 && size_t(policy) < names.size() ? names[size_t(policy)].c_str() : "?";
}

// Where the paper's rule and the controls differ from asrkf.
static void apply_preset(asrkf_config & c) {
    switch (c.policy) {
        case ASRKF_POLICY_RANDOM:
            c.score         = SCORE_RANDOM;
            c.recall        = RECALL_OFF;
            c.rewalk_tokens = 0;
            break;
        case ASRKF_POLICY_WINDOW:
            c.score         = SCORE_RECENCY;
            c.recall        = RECALL_OFF;
            c.rewalk_tokens = 0;
            c.timer_share   = 0;
            break;
        case ASRKF_POLICY_PAPER:
        case ASRKF_POLICY_FLAG_ALL:
            // The paper checks every step; its window, k and tau are not published: these are ours. On SmolLM2 tau = 10
            // freezes about two thirds; as tau is absolute, another model needs another one.
            c.score         = c.policy == ASRKF_POLICY_PAPER ? SCORE_MAGNITUDE : SCORE_NONE;
            c.tau           = c.policy == ASRKF_POLICY_PAPER ? 10.0f : 0.0f;
            c.sinks         = 0;
            c.window        = 64;
            c.interval      = 1;
            c.score_queries = 1;
            c.ema           = 0;
            c.hysteresis    = 0;
            c.recall        = RECALL_OFF;
            c.rewalk_tokens = 0;
            c.softness      = 2;
            break;
        case ASRKF_POLICY_REFREEKV: // the paper keeps its last token, whatever the rule says
            c.window        = 1;
            c.recall        = RECALL_OFF;
            c.rewalk_tokens = 0;
            c.timer_share   = 0;
            break;
        case ASRKF_POLICY_KVZIP:
            c.score         = SCORE_GATE;
            c.recall        = RECALL_OFF;
            c.rewalk_tokens = 0;
            c.timer_share   = 0;   // a score never changes: nothing to judge anew
            c.hysteresis    = 0;
            break;
        default:
            break;
    }
}

asrkf_config config_default(int32_t policy) {
    if (policy < ASRKF_POLICY_FULL || policy > ASRKF_POLICY_KVZIP) {
        invalid(format("policy %d is unknown", policy));
    }
    asrkf_config c = {};
    c.struct_size   = sizeof(c);
    c.policy        = policy;
    c.sinks         = 4;
    c.window        = 0;
    c.interval      = 8;
    c.score         = SCORE_ATTENTION;
    c.score_queries = 4;
    c.ema           = 0.7f;
    c.hysteresis    = 0.2f;
    c.ranking       = RANKING_SHARED;
    c.recall        = RECALL_EXACT;
    c.recall_share  = 0.25f;
    c.recall_limit  = 12;
    c.rewalk_tokens = 48;
    c.recovery      = RECOVERY_OFF;
    c.trigger_share = 0.05f;
    c.look_share    = 0.1f;
    c.softness      = 0.25f;
    c.timer_share   = policy == ASRKF_POLICY_ASRKF ? 0.0f : 0.1f; // with recall no token waits for a timer
    c.timer_grace   = 4;
    c.tau           = 0;
    c.tolerance     = 0.01f;
    c.rows          = 1;
    c.block         = 32;
    c.moves         = MOVES_AUTO;
    c.state         = STATE_OWN;
    const bool by_layer = policy == ASRKF_POLICY_ASRKF || policy == ASRKF_POLICY_REFREEKV || policy == ASRKF_POLICY_KVZIP;
    set_text(c.layers, by_layer ? "each" : "shared"); // the controls and the paper have one set
    set_text(c.score_layers, "auto");
    apply_preset(c);
    return c;
}

// The default policy with a part of the bytes that a full F16 cache of the served layers takes.
static const struct { const char * name; float f16_percent; } presets[] = { { "quality", 50 }, { "default", 33.3f }, { "aggressive", 12.5f } };

asrkf_config config_parse(const std::string & text) {
    const auto parts = split(text, ',');
    asrkf_config config = {};
    std::string policies = policy_choices;
    for (const auto & preset : presets) {
        policies += format("|%s", preset.name);
        if (parts[0] == preset.name) {
            config = config_default(ASRKF_POLICY_ASRKF);
            config.pool_f16_percent = preset.f16_percent;
        }
    }
    if (config.struct_size == 0) {
        config = config_default(parse_choice("policy", parts[0], policies.c_str()));
    }
    for (size_t i = 1; i < parts.size(); ++i) {
        const size_t equals = parts[i].find('=');
        if (equals == std::string::npos || equals == 0) {
            invalid(format("\"%s\" is not key=value (in \"%s\")", parts[i].c_str(), text.c_str()));
        }
        const std::string key = parts[i].substr(0, equals);
        const field * found = nullptr;
        std::vector<std::string> known;
        for (const auto & f : table) {
            known.push_back(f.name);
            if (key == f.name) {
                found = &f;
            }
        }
        if (!found) {
            invalid(format("key \"%s\" is unknown; did you mean \"%s\"? (known: %s)", key.c_str(),
                    nearest(key, known).c_str(), joined(known).c_str()));
        }
        set_field(config, *found, parts[i].substr(equals + 1));
    }
    config_check(config);
    return config;
}

std::string config_format(const asrkf_config & config) {
    std::string text = policy_name(config.policy);
    for (const auto & f : table) {
        std::string value;
        switch (f.kind) {
            case POOL:
                value = config.pool_bytes ? format("%lluB", (unsigned long long) config.pool_bytes)
                      : config.pool_ratio > 0 ? shortest(config.pool_ratio) + (config.pool_ratio == 1 ? ".0" : "")
                      : config.pool_f16_percent > 0 ? shortest(config.pool_f16_percent) + "%"
                      : config.pool_cells ? format("%u", config.pool_cells) : has_auto_pool(config) ? "auto" : "";
                break;
            case INTEGER: value = format("%u", at<uint32_t>(config, f)); break;
            case REAL:    value = shortest(at<float>(config, f)); break;
            case BYTES:   value = format("%llu", (unsigned long long) at<uint64_t>(config, f)); break;
            case CHOICE:  value = split(f.choices, '|').at(size_t(at<int32_t>(config, f))); break;
            case TEXT:    value = &at<char>(config, f); break;
        }
        if (!value.empty()) {
            text += format(",%s=%s", f.name, value.c_str());
        }
    }
    return text;
}

// Keys that contradict each other.
static void check_together(const asrkf_config & config) {
    parse_positions("pinned", config.pinned);
    if (std::strcmp(config.score_layers, "auto") != 0 && parse_layers("score_layers", config.score_layers).empty()) {
        invalid("score_layers= names no layer: write \"auto\", or layers such as \"0-3+7\"");
    }
    const bool has_groups = !parse_groups(config.layers).empty();
    const int n_sizes = (config.pool_cells != 0) + (config.pool_ratio != 0) + (config.pool_bytes != 0) + (config.pool_f16_percent != 0);
    if (n_sizes > 1 || !(config.pool_ratio >= 0 && config.pool_ratio <= 1) || !(config.pool_f16_percent >= 0 && config.pool_f16_percent <= 100)) {
        invalid("set at most one of pool_cells, pool_ratio (0..1], pool_bytes and pool_f16_percent (0..100]");
    }
    if (config.types == TYPES_AUTO && (has_groups || config.pool_cells != 0 || config.pool_ratio != 0)) {
        invalid("types=auto chooses by bytes: give the pool as auto, bytes (512MiB) or a part of the F16 bytes (33%), or leave types out");
    }
    if (config.recall == RECALL_MEAN_KEY && config.index != INDEX_AUTO && config.index != INDEX_F16) {
        invalid("recall=mean_key with a quantised index: a mean is rounded with every token that it takes up; use index=f16 or auto");
    }
    if (config.recall == RECALL_MEAN_KEY && config.score == SCORE_MAGNITUDE) {
        invalid("recall=mean_key with score=magnitude: a block's mean says nothing of its tokens' |q.k|; use score=attention or recall=exact");
    }
    const bool by_threshold = config.policy == ASRKF_POLICY_PAPER || config.policy == ASRKF_POLICY_FLAG_ALL;
    if (config.recovery == RECOVERY_SECOND_LOOK && (config.score != SCORE_ATTENTION || config.recall == RECALL_OFF || by_threshold)) {
        invalid("recovery=second_look restores the frozen tokens that a query attends to: it needs asrkf with score=attention, and recall=exact or mean_key");
    }
    if (config.score == SCORE_GATE && config.recall != RECALL_OFF) {
        invalid("score=gate with recall: a gate's score never changes, so nothing would ever come back by it; use recall=off");
    }
    if (config.score == SCORE_GATE && (by_threshold || config.policy == ASRKF_POLICY_REFREEKV)) {
        invalid("score=gate is for the drivers that keep a budget: use kvzip, or asrkf with recall=off");
    }
    if (config.gate_threshold > 0 && config.score != SCORE_GATE) {
        invalid("gate_threshold is for scores that gates give: use kvzip, or leave it out");
    }
    if (config.order == ORDER_RELEVANCE && config.score != SCORE_ATTENTION && config.score != SCORE_MAGNITUDE) {
        invalid("order=relevance goes by scores, and this score gives none: use score=attention or order=position");
    }
    if (has_groups && n_sizes > 0) {
        invalid("layers with pools of their own (\"0-8@512/9-29@1024\") leave no use for pool: drop one of the two");
    }
}

void config_check(const asrkf_config & config) {
    if (config.policy < ASRKF_POLICY_FULL || config.policy > ASRKF_POLICY_KVZIP) {
        invalid(format("policy %d is unknown", config.policy));
    }
    for (const auto & f : table) {
        switch (f.kind) {
            case INTEGER: check_range(f, at<uint32_t>(config, f), format("%u", at<uint32_t>(config, f))); break;
            case REAL:
                if (!std::isfinite(at<float>(config, f))) {
                    invalid(format("%s is not a finite number", f.name));
                }
                // the float nearest to a bound may lie just outside it
                check_range(f, double(std::nextafter(at<float>(config, f), float((f.minimum + f.maximum) / 2))), format("%g", at<float>(config, f)));
                break;
            case CHOICE:
                if (at<int32_t>(config, f) < 0 || size_t(at<int32_t>(config, f)) >= split(f.choices, '|').size()) {
                    invalid(format("%s %d is unknown", f.name, at<int32_t>(config, f)));
                }
                break;
            case TEXT:
                if (!std::memchr(&at<char>(config, f), 0, TEXT_BYTES)) {
                    invalid(format("%s is longer than %zu characters", f.name, TEXT_BYTES - 1));
                }
                break;
            case BYTES:
            case POOL:
                break;
        }
    }
    check_together(config);
}

size_t config_n_fields() { return sizeof(table) / sizeof(table[0]); }

asrkf_field config_field(size_t i) {
    const field & f = table[i];
    return { sizeof(asrkf_field), f.name, kind_names[f.kind], f.choices, f.minimum, f.maximum, f.doc };
}

ranges parse_positions(const char * key, const std::string & text) { return parse_ranges(key, text, true); }

ranges parse_layers(const char * key, const std::string & text) { return parse_ranges(key, text, false); }

std::vector<group_spec> parse_groups(const std::string & text) {
    std::vector<group_spec> groups;
    if (text == "shared" || text == "two" || text == "each") {
        return groups;
    }
    for (const auto & part : split(text, '/')) {
        const size_t sign = part.find('@');
        if (sign == std::string::npos || sign == 0) {
            invalid(format("layers=%s: write \"shared\", \"two\", \"each\", or groups with a pool each such as \"0-8@512/9-29@1024\"", text.c_str()));
        }
        const double cells = parse_number("layers", part.substr(sign + 1));
        if (!(cells >= 1) || cells > double(1 << 30) || cells != std::floor(cells)) {
            invalid(format("layers=%s: a pool of %s cells", text.c_str(), part.substr(sign + 1).c_str()));
        }
        groups.push_back({ parse_layers("layers", part.substr(0, sign)), uint32_t(cells) });
    }
    return groups;
}

bool has_auto_pool(const asrkf_config & config) { return config.policy != ASRKF_POLICY_FULL && is_pool_of_bytes(config) && !config.pool_bytes && config.pool_f16_percent == 0; }

bool is_pool_of_bytes(const asrkf_config & config) { return config.pool_cells == 0 && config.pool_ratio == 0 && parse_groups(config.layers).empty(); }

uint32_t resolve_pool(const asrkf_config & config, uint32_t n_ctx, bool is_mean) {
    uint64_t cells = config.pool_cells;
    if (config.pool_ratio > 0) {
        cells = uint64_t(std::ceil(double(config.pool_ratio) * n_ctx - 1e-6));
    }
    if (cells > n_ctx) {
        invalid(format("pool of %llu cells is larger than n_ctx %u: lower kv_pool, or use kv_policy=\"full\"", (unsigned long long) cells, n_ctx));
    }
    cells = is_mean ? std::max<uint64_t>(cells, POOL_PAD_CELLS) : (cells + POOL_PAD_CELLS - 1) / POOL_PAD_CELLS * POOL_PAD_CELLS;
    return uint32_t(std::min<uint64_t>(cells, n_ctx)); // n_ctx is a multiple of the padding, too
}

uint32_t count_positions(ranges set) {
    std::sort(set.begin(), set.end());
    uint32_t n = 0;
    int32_t  counted_to = 0;
    for (const auto & [from, to] : set) {
        n += uint32_t(std::max(0, to - std::max(from, counted_to)));
        counted_to = std::max(counted_to, to);
    }
    return n;
}

bool contains(const ranges & set, int32_t pos) {
    return std::any_of(set.begin(), set.end(), [&](const auto & range) { return pos >= range.first && pos < range.second; });
}

ranges without(const ranges & set, int32_t p0, int32_t p1) {
    ranges rest;
    for (const auto & [from, to] : set) {
        if (from < p0) {
            rest.emplace_back(from, std::min(to, p0));
        }
        if (to > p1) {
            rest.emplace_back(std::max(from, p1), to);
        }
    }
    return rest;
}

} // namespace asrkf
