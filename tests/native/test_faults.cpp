// Bad input, leaks: every call of asrkf.h with what it must refuse, random configurations, side files and states, and many
// contexts. A context that was freed is not among them: nothing can tell it from a good pointer.
// Seeds are printed; ASRKF_TEST_SEED sets the first, ASRKF_FUZZ_CASES how many cases each kind of input gets.
#include "tiny.h"

#include "llama/calibration.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif

namespace {

constexpr int32_t LOWEST  = std::numeric_limits<int32_t>::min();
constexpr int32_t HIGHEST = std::numeric_limits<int32_t>::max();

int n_cases(int usual) {
    const char * text = std::getenv("ASRKF_FUZZ_CASES");
    return text ? std::atoi(text) : usual;
}

uint32_t first_seed() {
    const char * text = std::getenv("ASRKF_TEST_SEED");
    return text ? uint32_t(std::atol(text)) : 20251211;
}

// Shows the first few of many failures.
bool may_print() {
    static int n_printed = 0;
    return n_printed++ < 20;
}

// A configuration in few words: the long list of defaults says nothing.
std::string shortened(const char * text) { return std::string(text).substr(0, 160) + (std::strlen(text) > 160 ? "..." : ""); }

template <typename Call> bool gives(Call call, asrkf_status wanted, const char * what) {
    asrkf_clear_error();
    const asrkf_status got = call();
    const bool good = got == wanted && asrkf_last_status() == wanted && (*asrkf_last_error() != 0) == (wanted != ASRKF_OK);
    if (!good && may_print()) {
        std::printf("%s: status %d, wanted %d; last error %d \"%s\"\n", what, got, wanted, asrkf_last_status(), asrkf_last_error());
    }
    return good;
}

// The call gives this status, and a text unless it is ASRKF_OK.
#define GIVES(status, call) CHECK(gives([&] { return call; }, status, #call))
#define REFUSED(call)       GIVES(ASRKF_INVALID_ARGUMENT, call)

template <typename T> T sized(size_t struct_size = sizeof(T)) {
    T s = {};
    s.struct_size = uint32_t(struct_size);
    return s;
}

// Every call that takes a struct by struct_size, with sizes that are not its own.
template <typename T, typename Call> bool refuses_other_sizes(Call call) {
    bool good = true;
    for (const size_t size : { size_t(0), sizeof(T) - 1, sizeof(T) + 1, size_t(std::numeric_limits<uint32_t>::max()) }) {
        T s = sized<T>(size), before = s;
        good = good && gives([&] { return call(&s); }, ASRKF_INVALID_ARGUMENT, "another struct_size") && std::memcmp(&s, &before, sizeof(s)) == 0;
    }
    return good;
}

asrkf_config parsed(const char * text) {
    asrkf_config config = sized<asrkf_config>();
    CHECK(asrkf_config_parse(text, &config) == ASRKF_OK);
    return config;
}

// Tokens that are frozen, in two groups, and room to go on.
llama_context * frozen_context() {
    llama_context * ctx = make_context("asrkf,layers=0@256/1@512,window=64", 1024, 128);
    CHECK(ctx);
    for (int i = 0; ctx && i < 6; ++i) {
        CHECK(decode(ctx, std::vector<llama_token>(i < 5 ? 120 : 1, i)) == 0);
    }
    CHECK(ctx && stats_of(ctx).n_groups == 2 && stats_of(ctx).frozen_cells > 0);
    return ctx;
}

} // namespace

TEST(no_context, "calls that need no context refuse NULL, other struct sizes and values out of range") {
    asrkf_config config = parsed("asrkf,pool=512");
    const asrkf_config before = config;
    char text[8192] = "kept";

    CHECK(*asrkf_version());
    CHECK(*asrkf_status_name(ASRKF_OK) && *asrkf_status_name(ASRKF_INTERNAL));
    CHECK(std::strcmp(asrkf_status_name(asrkf_status(ASRKF_INTERNAL + 1)), "unknown") == 0);

    REFUSED(asrkf_config_default(ASRKF_POLICY_ASRKF, nullptr));
    for (const int32_t policy : { LOWEST, -1, ASRKF_POLICY_KVZIP + 1, HIGHEST }) {
        REFUSED(asrkf_config_default(policy, &config));
    }
    CHECK(refuses_other_sizes<asrkf_config>([](asrkf_config * c) { return asrkf_config_default(ASRKF_POLICY_ASRKF, c); }));

    REFUSED(asrkf_config_parse(nullptr, &config));
    REFUSED(asrkf_config_parse("asrkf", nullptr));
    REFUSED(asrkf_config_parse("", &config));
    REFUSED(asrkf_config_parse(std::string(100000, 'a').c_str(), &config));
    REFUSED(asrkf_config_parse(("asrkf,pinned=" + std::string(100000, '1')).c_str(), &config));
    REFUSED(asrkf_config_parse(std::string(10000, ',').c_str(), &config));
    CHECK(refuses_other_sizes<asrkf_config>([](asrkf_config * c) { return asrkf_config_parse("asrkf", c); }));
    CHECK(std::memcmp(&config, &before, sizeof(config)) == 0);

    REFUSED(asrkf_config_format(nullptr, text, sizeof(text)));
    REFUSED(asrkf_config_format(&config, nullptr, sizeof(text)));
    REFUSED(asrkf_config_format(&config, text, 0));
    CHECK(refuses_other_sizes<asrkf_config>([&](asrkf_config * c) { return asrkf_config_format(c, text, sizeof(text)); }));
    CHECK(std::strcmp(text, "kept") == 0);
    GIVES(ASRKF_OK, asrkf_config_format(&config, text, SIZE_MAX));
    const size_t length = std::strlen(text);
    REFUSED(asrkf_config_format(&config, text, length));
    GIVES(ASRKF_OK, asrkf_config_format(&config, text, length + 1));

    asrkf_field field = sized<asrkf_field>();
    REFUSED(asrkf_config_field(0, nullptr));
    REFUSED(asrkf_config_field(SIZE_MAX, &field));
    CHECK(refuses_other_sizes<asrkf_field>([](asrkf_field * f) { return asrkf_config_field(0, f); }));

    const float logits[3] = { 1, 2, 3 };
    double entropy = -1;
    REFUSED(asrkf_entropy(nullptr, 3, &entropy));
    REFUSED(asrkf_entropy(nullptr, SIZE_MAX, &entropy));
    REFUSED(asrkf_entropy(logits, 3, nullptr));
    CHECK(entropy == -1);
    GIVES(ASRKF_OK, asrkf_entropy(logits, 0, &entropy));
    CHECK(std::isnan(entropy)); // of nothing

    std::strcpy(text, "kept");
    REFUSED(asrkf_model_fingerprint(nullptr, text, sizeof(text)));
    REFUSED(asrkf_model_fingerprint(load_model(), nullptr, sizeof(text)));
    for (const size_t size : { 0, 1, 10 }) {
        REFUSED(asrkf_model_fingerprint(load_model(), text, size));
    }
    CHECK(std::strcmp(text, "kept") == 0);
    GIVES(ASRKF_OK, asrkf_model_fingerprint(load_model(), text, SIZE_MAX));
    CHECK(std::strlen(text) < 64);
}

TEST(bad_structs, "a configuration that no string could give is refused wherever one is taken") {
    const auto refused = [](auto change) {
        asrkf_config config = parsed("asrkf,pool=512");
        char text[8192];
        change(config);
        REFUSED(asrkf_config_format(&config, text, sizeof(text)));
        REFUSED(asrkf_next_context(&config));
    };
    refused([](asrkf_config & c) { c.policy = -1; });
    refused([](asrkf_config & c) { c.policy = HIGHEST; });
    refused([](asrkf_config & c) { c.score = LOWEST; });
    refused([](asrkf_config & c) { c.recall = 77; });
    refused([](asrkf_config & c) { c.moves = -1; });
    refused([](asrkf_config & c) { c.interval = 0; });
    refused([](asrkf_config & c) { c.window = std::numeric_limits<uint32_t>::max(); });
    refused([](asrkf_config & c) { c.block = 0; });
    refused([](asrkf_config & c) { c.ema = NAN; });
    refused([](asrkf_config & c) { c.hysteresis = -1; });
    refused([](asrkf_config & c) { c.softness = 0; });
    refused([](asrkf_config & c) { c.tau = INFINITY; });
    refused([](asrkf_config & c) { c.pool_ratio = 0.5f; });
    refused([](asrkf_config & c) { c.pool_cells = 0; c.pool_ratio = NAN; });
    refused([](asrkf_config & c) { c.pool_cells = 0; c.pool_ratio = -1; });
    refused([](asrkf_config & c) { std::memset(c.layers, 'x', sizeof(c.layers)); });
    refused([](asrkf_config & c) { std::memset(c.pinned, '1', sizeof(c.pinned)); });
    refused([](asrkf_config & c) { std::memset(c.calibration, '/', sizeof(c.calibration)); });
    refused([](asrkf_config & c) { std::memset(c.score_layers, 0xff, sizeof(c.score_layers)); });
    refused([](asrkf_config & c) { c.layers[0] = 0; });
    CHECK(refuses_other_sizes<asrkf_config>([](asrkf_config * c) { return asrkf_next_context(c); }));
}

TEST(next_context_kept, "refused settings for the next context leave the earlier ones") {
    asrkf_config good = parsed("window,pool=512"), bad = good;
    bad.interval = 0;
    GIVES(ASRKF_OK, asrkf_next_context(&good));
    REFUSED(asrkf_next_context(&bad));
    llama_context * ctx = make_context(nullptr, 1024, 64);
    CHECK(ctx && stats_of(ctx).policy == ASRKF_POLICY_WINDOW);
    llama_free(ctx);
    GIVES(ASRKF_OK, asrkf_next_context(&good));
    GIVES(ASRKF_OK, asrkf_next_context(nullptr));
    ctx = make_context(nullptr, 1024, 64);
    CHECK(ctx && stats_of(ctx).policy == ASRKF_POLICY_FULL);
    llama_free(ctx);
}

TEST(bad_arguments, "calls on a context refuse NULL, sequences, groups, positions and sizes that it does not have, and change nothing") {
    llama_context * frozen = frozen_context();
    llama_context * empty  = make_context("asrkf,pool=512", 1024, 128); // before its first decode
    CHECK(empty);
    for (llama_context * ctx : { frozen, empty }) {
        const bool    is_empty = ctx == empty;
        const int32_t last     = int32_t(stats_of(ctx).tokens) - 1;
        const picture before(ctx, 1);

        asrkf_config config = sized<asrkf_config>();
        asrkf_stats stats = sized<asrkf_stats>();
        asrkf_group_stats group = sized<asrkf_group_stats>();
        REFUSED(asrkf_get_config(nullptr, &config));
        REFUSED(asrkf_get_config(ctx, nullptr));
        REFUSED(asrkf_get_stats(nullptr, &stats));
        REFUSED(asrkf_get_stats(ctx, nullptr));
        REFUSED(asrkf_get_group_stats(nullptr, 0, &group));
        REFUSED(asrkf_get_group_stats(ctx, 0, nullptr));
        CHECK(refuses_other_sizes<asrkf_config>([&](asrkf_config * c) { return asrkf_get_config(ctx, c); }));
        CHECK(refuses_other_sizes<asrkf_stats>([&](asrkf_stats * s) { return asrkf_get_stats(ctx, s); }));
        CHECK(refuses_other_sizes<asrkf_group_stats>([&](asrkf_group_stats * g) { return asrkf_get_group_stats(ctx, 0, g); }));
        const uint32_t n_groups = stats_of(ctx).n_groups;
        for (const uint32_t ig : { n_groups, n_groups + 1, 1u << 31, std::numeric_limits<uint32_t>::max() }) {
            REFUSED(asrkf_get_group_stats(ctx, ig, &group));
        }

        uint64_t moved = 12345;
        using range_call = asrkf_status (*)(llama_context *, int32_t, int32_t, int32_t, uint64_t *);
        const range_call calls[] = {
            asrkf_freeze, asrkf_restore,
            [](llama_context * c, int32_t seq_id, int32_t p0, int32_t p1, uint64_t *) { return asrkf_pin(c, seq_id, p0, p1); },
            [](llama_context * c, int32_t seq_id, int32_t p0, int32_t p1, uint64_t *) { return asrkf_unpin(c, seq_id, p0, p1); },
        };
        for (const range_call call : calls) {
            REFUSED(call(nullptr, 0, 0, 1, &moved));
            for (const int32_t seq_id : { LOWEST, -2, -1, 1, 255, HIGHEST }) {
                REFUSED(call(ctx, seq_id, 0, 1, &moved));
                REFUSED(call(ctx, seq_id, 0, -1, nullptr));
            }
            for (const auto & [p0, p1] : { std::pair(-1, 5), { LOWEST, 5 }, { LOWEST, LOWEST }, { -1, -1 }, { 5, 3 }, { HIGHEST, 0 }, { HIGHEST, HIGHEST - 1 } }) {
                REFUSED(call(ctx, 0, p0, p1, &moved));
            }
            CHECK(moved == 12345);
            for (const auto & [p0, p1] : { std::pair(5, 5), { HIGHEST, HIGHEST }, { HIGHEST, -1 }, { HIGHEST, LOWEST }, { last + 1, -1 }, { 1 << 30, -1 } }) {
                GIVES(ASRKF_OK, call(ctx, 0, p0, p1, nullptr)); // nothing is there
            }
        }
        GIVES(is_empty ? ASRKF_OK : ASRKF_PROTECTED, asrkf_freeze(ctx, 0, 0, HIGHEST, nullptr));
        GIVES(is_empty ? ASRKF_OK : ASRKF_PROTECTED, asrkf_freeze(ctx, 0, 0, LOWEST, nullptr));
        GIVES(is_empty ? ASRKF_OK : ASRKF_POOL_FULL, asrkf_restore(ctx, 0, 0, HIGHEST, nullptr));
        GIVES(ASRKF_POOL_FULL, asrkf_pin(ctx, 0, 0, HIGHEST));
        GIVES(ASRKF_POOL_FULL, asrkf_pin(ctx, 0, 1 << 30, HIGHEST));
        GIVES(is_empty ? ASRKF_OK : ASRKF_POOL_FULL, asrkf_pin(ctx, 0, 0, -1));
        GIVES(ASRKF_OK, asrkf_unpin(ctx, 0, 0, HIGHEST));

        int32_t pos[2] = { -7, -7 };
        uint8_t state[2] = { 77, 77 };
        size_t n = 12345;
        REFUSED(get_tokens(nullptr, 0, pos, state, 1, &n));
        REFUSED(get_tokens(ctx, 0, pos, state, 1, nullptr));
        for (const uint32_t ig : { n_groups, std::numeric_limits<uint32_t>::max() }) {
            REFUSED(get_tokens(ctx, ig, pos, state, 1, &n));
        }
        CHECK(n == 12345);
        for (const size_t capacity : { size_t(0), size_t(1), SIZE_MAX }) {
            GIVES(ASRKF_OK, get_tokens(ctx, 0, nullptr, nullptr, capacity, &n));
            CHECK(int64_t(n) == last + 1);
        }
        GIVES(ASRKF_OK, get_tokens(ctx, 0, pos, state, 0, &n));
        CHECK(pos[0] == -7 && state[0] == 77);
        GIVES(ASRKF_OK, get_tokens(ctx, 0, pos, state, 1, &n));
        CHECK(pos[1] == -7 && state[1] == 77 && (is_empty || pos[0] == 0));

        n = 12345;
        REFUSED(asrkf_get_pinned(nullptr, 0, pos, 1, &n));
        REFUSED(asrkf_get_pinned(ctx, 0, pos, 1, nullptr));
        REFUSED(asrkf_get_pinned(ctx, 0, nullptr, 1, &n));
        for (const int32_t seq_id : { LOWEST, -1, 1, HIGHEST }) {
            REFUSED(asrkf_get_pinned(ctx, seq_id, pos, 1, &n));
        }
        CHECK(n == 12345);
        GIVES(ASRKF_OK, asrkf_get_pinned(ctx, 0, nullptr, 0, &n)); // unpinned above
        CHECK(n == 0);

        const size_t token_bytes = group_of(ctx, 0).token_bytes;
        std::vector<uint8_t> row(token_bytes + 1, 0xa5);
        const auto untouched = row;
        REFUSED(get_rows(nullptr, 0, 0, row.data(), token_bytes));
        REFUSED(get_rows(ctx, 0, 0, nullptr, token_bytes));
        for (const uint32_t ig : { n_groups, std::numeric_limits<uint32_t>::max() }) {
            REFUSED(get_rows(ctx, ig, 0, row.data(), token_bytes));
        }
        for (const int32_t p : { LOWEST, -1, last + 1, 1 << 30, HIGHEST }) {
            REFUSED(get_rows(ctx, 0, p, row.data(), token_bytes));
        }
        for (const size_t size : { size_t(0), token_bytes - 1, token_bytes + 1, SIZE_MAX }) {
            REFUSED(get_rows(ctx, 0, 0, row.data(), size));
        }
        CHECK(row == untouched);

        asrkf_step steps[2];
        uint64_t n_steps = 12345;
        REFUSED(asrkf_trace(nullptr, steps, 2));
        REFUSED(asrkf_trace(ctx, steps, 0));
        REFUSED(asrkf_trace_count(nullptr, &n_steps));
        REFUSED(asrkf_trace_count(ctx, nullptr));
        CHECK(n_steps == 12345);
        for (const size_t capacity : { size_t(0), SIZE_MAX }) {
            GIVES(ASRKF_OK, asrkf_trace(ctx, nullptr, capacity));
        }

        REFUSED(asrkf_prompt_follows(nullptr, 1));
        REFUSED(asrkf_set_host_limit(nullptr, 0));
        GIVES(ASRKF_OK, asrkf_prompt_follows(ctx, LOWEST));
        GIVES(ASRKF_OK, asrkf_prompt_follows(ctx, 0));

        CHECK(picture(ctx, 1) == before);
        CHECK(decode(ctx, { 1 }) == 0 && int64_t(stats_of(ctx).tokens) == last + 2);
        llama_free(ctx);
    }
}

TEST(without_policy, "a context without a policy gives its figures; every other call says that it has none") {
    llama_context * ctx = make_context(nullptr, 512, 64);
    CHECK(ctx && decode(ctx, { 1, 2, 3 }) == 0);
    const picture before(ctx, 1);
    asrkf_config config = sized<asrkf_config>();
    asrkf_group_stats group = sized<asrkf_group_stats>();
    asrkf_step step;
    uint64_t n = 0;
    size_t n_tokens = 0;
    uint8_t byte = 0;
    GIVES(ASRKF_NO_POLICY, asrkf_freeze(ctx, 0, 0, 1, &n));
    GIVES(ASRKF_NO_POLICY, asrkf_restore(ctx, -1, 5, 3, &n));
    GIVES(ASRKF_NO_POLICY, asrkf_pin(ctx, 0, 0, 1));
    GIVES(ASRKF_NO_POLICY, asrkf_unpin(ctx, 0, 0, -1));
    GIVES(ASRKF_NO_POLICY, asrkf_prompt_follows(ctx, 1));
    GIVES(ASRKF_NO_POLICY, asrkf_set_host_limit(ctx, 0));
    GIVES(ASRKF_NO_POLICY, asrkf_get_config(ctx, &config));
    GIVES(ASRKF_NO_POLICY, asrkf_get_group_stats(ctx, 0, &group));
    GIVES(ASRKF_NO_POLICY, get_tokens(ctx, 0, nullptr, nullptr, 0, &n_tokens));
    GIVES(ASRKF_NO_POLICY, get_rows(ctx, 0, 0, &byte, 1));
    GIVES(ASRKF_NO_POLICY, asrkf_trace(ctx, &step, 1));
    GIVES(ASRKF_NO_POLICY, asrkf_trace_count(ctx, &n));
    CHECK(picture(ctx, 1) == before && stats_of(ctx).tokens == 3);
    llama_free(ctx);
}

//
// configurations
//

namespace {

// A text as users write it, or worse: values at, near and past the table's bounds.
std::string random_config(std::mt19937 & random) {
    static const char * const names[] = { "asrkf", "paper", "window", "random", "flag-all", "full", "default", "quality" };
    static const char * const numbers[] = { "0", "-0", "1", "1.0", "0.5", "0.999", "1e-45", "1e308", "1e999", "-1", "4294967295", "4294967296", "18446744073709551616",
        "0x1p3", "nan", "inf", "+5", " 5", "5 ", "", ".", "512MiB", "1.5GB", "1e18", "1e18B", "0.4B", "1073741825", "0.1234567890123" };
    static const char * const texts[] = { "", "shared", "each", "two", "0-3", "0-3+7", "0@512/1@768", "0-128+512-640", "5-3", "999999999", "0-999999999", "auto", "a=b", "/", "@", "+" };
    const auto any = [&](const auto & values) { return std::string(values[random() % std::size(values)]); };
    std::string text = any(names);
    for (unsigned n = random() % 5; n > 0; --n) {
        asrkf_field f = sized<asrkf_field>();
        size_t n_fields = 0;
        while (asrkf_config_field(n_fields, &f) == ASRKF_OK) {
            n_fields++;
        }
        CHECK(asrkf_config_field(random() % n_fields, &f) == ASRKF_OK);
        const std::string kind = f.kind;
        std::string value;
        if (kind == "choice") {
            const std::string choices = f.choices;
            const size_t begin = random() % choices.size();
            const size_t from = choices.rfind('|', begin) + 1; // npos + 1 is 0
            value = choices.substr(from, choices.find('|', from) - from);
        } else if (kind == "text" && random() % 8 != 0) {
            value = any(texts);
        } else if (random() % 2 == 0) {
            value = any(numbers);
        } else if (f.maximum > f.minimum) {
            const double part = double(random()) / 4294967295.0;
            const double number = f.minimum + (f.maximum - f.minimum)*(random() % 2 ? part*part*part*part : part);
            char shown[64];
            std::snprintf(shown, sizeof(shown), random() % 2 ? "%.0f" : "%.9g", number);
            value = shown;
        } else {
            value = std::to_string(1 + random() % 9000);
        }
        text += "," + std::string(f.name) + "=" + value;
    }
    return text;
}

std::string mutated(std::string text, std::mt19937 & random) {
    for (unsigned n = random() % 4; n > 0 && !text.empty(); --n) {
        const size_t at = random() % text.size(), count = 1 + random() % 12;
        switch (random() % 5) {
            case 0:  text[at] = char(1 + random() % 255); break;
            case 1:  text.erase(at, count); break;
            case 2:  text.insert(at, text.substr(random() % text.size(), count)); break;
            case 3:  text.insert(at, 1, ",=/@+-.0e"[random() % 9]); break;
            default: text.resize(at); break;
        }
    }
    return text;
}

// "" if the parser keeps its promises on this text, else what it broke.
std::string broken_promise(const std::string & text) {
    char first[8192], second[8192];
    asrkf_config config = sized<asrkf_config>(), again = config;
    std::memset(config.pinned, 0x5a, sizeof(config.pinned));
    asrkf_clear_error();
    const asrkf_status status = asrkf_config_parse(text.c_str(), &config);
    if (status != ASRKF_OK) {
        return !*asrkf_last_error() ? "refused without a text" : asrkf_last_status() != status ? "another last status" : config.pinned[0] != 0x5a ? "refused, and written" : "";
    }
    if (asrkf_config_format(&config, first, sizeof(first)) != ASRKF_OK) {
        return std::string("accepted, but not to be written: ") + asrkf_last_error();
    }
    if (asrkf_config_parse(first, &again) != ASRKF_OK) {
        return "written as " + shortened(first) + ", which is refused: " + asrkf_last_error();
    }
    if (asrkf_config_format(&again, second, sizeof(second)) != ASRKF_OK || std::strcmp(first, second) != 0) {
        return "written as " + shortened(first) + ", and read back as " + shortened(second);
    }
    return std::memcmp(&config, &again, sizeof(config)) != 0 ? "written as " + shortened(first) + ", which is another configuration" : "";
}

bool keeps_promises(const std::string & text) {
    const std::string broken = broken_promise(text);
    if (!broken.empty() && may_print()) {
        std::printf("\"%s\": %s\n", text.c_str(), broken.c_str());
    }
    return broken.empty();
}

} // namespace

TEST(config_fuzz, "a random configuration string is refused with a text, or reads back as it is written") {
    const uint32_t seed = first_seed();
    const int n = n_cases(SANITIZED ? 50000 : 200000);
    std::printf("     seed %u, %d strings\n", seed, n);
    std::mt19937 random(seed);
    int n_good = 0, n_broken = 0;
    for (int i = 0; i < n; ++i) {
        std::string text;
        if (i % 8 == 0) {
            text.resize(random() % 64);
            for (char & c : text) {
                c = char(1 + random() % 255);
            }
        } else {
            text = mutated(random_config(random), random);
        }
        n_broken += !keeps_promises(text);
        asrkf_config config = sized<asrkf_config>();
        n_good += asrkf_config_parse(text.c_str(), &config) == ASRKF_OK;
    }
    CHECK(n_broken == 0);
    CHECK(n_good > n/20 && n_good < n/2); // both paths are taken
    std::printf("     %d accepted, %d broken promises\n", n_good, n_broken);
}

TEST(config_bounds, "every number of the table is accepted at its bounds, and refused past them") {
    asrkf_field f = sized<asrkf_field>();
    for (size_t i = 0; asrkf_config_field(i, &f) == ASRKF_OK; ++i) {
        const std::string kind = f.kind;
        if (kind != "integer" && kind != "real") {
            continue;
        }
        for (const bool upper : { false, true }) {
            const double bound = upper ? f.maximum : f.minimum, past = upper ? bound*1.01 + 1 : bound - 1;
            char text[128];
            std::snprintf(text, sizeof(text), "kvzip,%s=%.10g", f.name, bound); // which all numbers are for, or nothing to
            asrkf_config config = sized<asrkf_config>();
            GIVES(ASRKF_OK, asrkf_config_parse(text, &config));
            CHECK(keeps_promises(text));
            std::snprintf(text, sizeof(text), "kvzip,%s=%.10g", f.name, past);
            REFUSED(asrkf_config_parse(text, &config));
        }
    }
}

TEST(no_pool_by_rounding, "a pool that is too small to be told from none is refused, not taken for none") {
    asrkf_config config = sized<asrkf_config>();
    for (const char * text : { "asrkf,pool=1e-60", "asrkf,pool=0x1p-3", "asrkf,pool=1e-320" }) {
        GIVES(ASRKF_INVALID_ARGUMENT, asrkf_config_parse(text, &config));
    }
}

TEST(no_scoring_layers, "score_layers without a layer is refused, not a policy without scores") {
    asrkf_config config = sized<asrkf_config>();
    REFUSED(asrkf_config_parse("asrkf,pool=512,score_layers=", &config));
}

//
// side files
//

namespace {

struct temporary_file {
    temporary_file() : path((std::filesystem::temp_directory_path() / ("asrkf-faults-" + std::to_string(std::random_device()()) + ".json")).string()) {}
    ~temporary_file() { std::filesystem::remove(path); }
    void write(const std::string & text) const { std::ofstream(path, std::ios::binary | std::ios::trunc) << text; }
    const std::string path;
};

std::string side_file(const std::string & sensitivities, const std::string & score_layers) {
    char name[64];
    CHECK(asrkf_model_fingerprint(load_model(), name, sizeof(name)) == ASRKF_OK);
    return std::string("{\n \"format\": \"asrkf-calibration\", \"version\": 2,\n \"model\": \"") + name + "\",\n \"sensitivities\": " + sensitivities + ",\n \"score_layers\": " +
        score_layers + "\n}\n";
}

} // namespace

TEST(calibration_fuzz, "a damaged side file is refused with a text, or what is read of it is sound") {
    const uint32_t seed = first_seed();
    const int n = n_cases(20000);
    std::printf("     seed %u, %d files\n", seed, n);
    std::mt19937 random(seed);
    const temporary_file file;
    const std::string good = side_file("[0.25, 0.5]", "[0, 1]");
    static const char * const pieces[] = { "null", "-1", "1e999", "1e308", "NaN", "\"x\"", "[]", "{}", "[[", "\\u0000", "\xff", "true", "4294967296", "1.5", ",", "\"model\": 1," };
    int n_good = 0, n_refused = 0, n_unsound = 0;
    for (int i = 0; i < n; ++i) {
        std::string text = good;
        for (unsigned m = i == 0 ? 0 : 1 + random() % 3; m > 0 && !text.empty(); --m) {
            const size_t at = random() % text.size(), count = 1 + random() % 20;
            switch (random() % 6) {
                case 0:  text[at] = char(random()); break;
                case 1:  text.erase(at, count); break;
                case 2:  text.insert(at, text.substr(random() % text.size(), count)); break;
                case 3:  text.resize(at); break;
                default: text.replace(at, random() % 4, pieces[random() % std::size(pieces)]); break;
            }
        }
        file.write(text);
        try {
            const asrkf::calibration c = asrkf::read_calibration(file.path);
            const auto sound = [](double s) { return std::isfinite(s) && s > 0; };
            const bool good_one = std::all_of(c.sensitivities.begin(), c.sensitivities.end(), sound) && !c.score_layers.empty() &&
                std::adjacent_find(c.score_layers.begin(), c.score_layers.end(), std::greater_equal<>()) == c.score_layers.end();
            n_unsound += !good_one;
            n_good++;
        } catch (const asrkf::error & e) {
            n_unsound += e.status != ASRKF_INVALID_ARGUMENT || !std::strstr(e.what(), file.path.c_str());
            n_refused++;
        }
    }
    CHECK(n_unsound == 0);
    CHECK(n_good > 0 && n_refused > n/2);
    file.write(std::string(200000, '['));
    CHECK(!thrown([&] { asrkf::read_calibration(file.path); }).empty());
    CHECK(!thrown([&] { asrkf::read_calibration("/"); }).empty());
}

TEST(calibration_values, "a side file of this model makes a context or is refused with the reason, whatever its values") {
    const temporary_file file;
    for (const char * layers : { "each", "two", "shared" }) {
        for (const char * values : { "[1e-320, 1e308]", "[1e308, 1e308]", "[1e308, 1e-308]", "[1, 1]", "[1]", "[1, 1, 1]", "[]", "[0, 1]", "[-1, 1]" }) {
            file.write(side_file(values, "[0, 1]"));
            asrkf_clear_error();
            llama_context * ctx = make_context(("asrkf,pool=512,window=64,layers=" + std::string(layers) + ",calibration=" + file.path).c_str(), 1024, 64);
            CHECK(ctx ? decode(ctx, { 1, 2, 3 }) == 0 : std::strstr(asrkf_last_error(), file.path.c_str()) != nullptr);
            llama_free(ctx);
        }
    }
}

TEST(calibration_numbers, "a layer number that is none is refused, not rounded or wrapped into one") {
    const temporary_file file;
    for (const char * layers : { "[4294967296]", "[-4294967296]", "[0.5]", "[0, 1.5]", "[-1]", "[true]" }) {
        file.write(side_file("[1, 1]", layers));
        const bool refused = !thrown([&] { asrkf::read_calibration(file.path); }).empty();
        if (!refused) {
            std::printf("score_layers %s was accepted\n", layers);
        }
        CHECK(refused);
    }
}

//
// states
//

namespace {

using bytes = std::vector<uint8_t>;

bytes whole_state(llama_context * ctx) {
    bytes blob(llama_state_get_size(ctx));
    CHECK(!blob.empty() && llama_state_get_data(ctx, blob.data(), blob.size()) == blob.size());
    return blob;
}

bytes sequence_state(llama_context * ctx) {
    bytes blob(llama_state_seq_get_size(ctx, 0));
    CHECK(!blob.empty() && llama_state_seq_get_data(ctx, blob.data(), blob.size(), 0) == blob.size());
    return blob;
}

size_t load(llama_context * ctx, const bytes & blob, bool whole) {
    return whole ? llama_state_set_data(ctx, blob.data(), blob.size()) : llama_state_seq_set_data(ctx, blob.data(), blob.size(), 0);
}

// Damage without knowledge of the format: most of it near the ends, where formats have their counts.
bytes damaged(bytes blob, const bytes & other, std::mt19937 & random) {
    static const uint32_t words[] = { 0, 1, 2, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffe, 0x7e007e00, 0x7c007c00, 0xfc00fc00, 0x7fc00000, 0x7f800000 };
    const auto anywhere = [&]() -> size_t {
        const size_t size = blob.size(), near_end = std::min<size_t>(size, 1 + random() % (1u << (random() % 15)));
        const uint32_t where = random() % 4;
        return where == 0 ? random() % size : where == 1 ? size - near_end : near_end - 1;
    };
    for (unsigned n = 1 + random() % 4; n > 0 && !blob.empty(); --n) {
        const size_t at = anywhere(), count = std::min<size_t>(blob.size() - at, size_t(1) << (random() % 16));
        switch (random() % 8) {
            case 0: blob.resize(at); break;
            case 1: blob.resize(blob.size() - std::min<size_t>(blob.size(), 1 + random() % 64)); break;
            case 2: blob[at] ^= uint8_t(1 + random() % 255); break;
            case 3:
            case 4: {
                const uint32_t word = words[random() % std::size(words)];
                const size_t aligned = at / 4 * 4;
                std::memcpy(blob.data() + aligned, &word, std::min<size_t>(sizeof(word), blob.size() - aligned));
            } break;
            case 5: blob.erase(blob.begin() + std::ptrdiff_t(at), blob.begin() + std::ptrdiff_t(at + count)); break;
            case 6: { // a piece of it, or of another state, somewhere else
                const bytes & source = random() % 2 ? other : blob;
                const size_t from = random() % source.size(), n_bytes = std::min(count, source.size() - from);
                const bytes piece(source.begin() + std::ptrdiff_t(from), source.begin() + std::ptrdiff_t(from + n_bytes));
                if (random() % 2) {
                    blob.insert(blob.begin() + std::ptrdiff_t(at), piece.begin(), piece.end());
                } else {
                    std::copy(piece.begin(), piece.begin() + std::ptrdiff_t(std::min(n_bytes, blob.size() - at)), blob.begin() + std::ptrdiff_t(at));
                }
            } break;
            default: std::fill(blob.begin() + std::ptrdiff_t(at), blob.begin() + std::ptrdiff_t(at + count), uint8_t(random())); break;
        }
    }
    return blob;
}

void fuzz_states(const char * policy, bool whole, uint32_t seed, int n_wanted) {
    const auto fresh = [&] { return make_context(policy, 1024, 128); };
    llama_context * ctx = fresh();
    CHECK(ctx);
    if (!ctx) {
        return;
    }
    std::mt19937 random(seed);
    const auto go_on = [&](size_t n) {
        std::vector<llama_token> tokens(n);
        for (llama_token & t : tokens) {
            t = llama_token(random() % 256);
        }
        return decode(ctx, tokens) == 0;
    };
    for (int i = 0; i < 6; ++i) {
        CHECK(go_on(100));
    }
    CHECK(stats_of(ctx).frozen_cells > 0);
    const bytes good = whole ? whole_state(ctx) : sequence_state(ctx);
    CHECK(go_on(30));
    const bytes other = whole ? sequence_state(ctx) : whole_state(ctx);
    const picture first(ctx, 1);
    picture before = first;
    int n_refused = 0, n_taken = 0;
    const auto try_one = [&](const bytes & blob, const char * what, uint32_t number) {
        const int n_failed = n_failed_checks;
        const size_t n = load(ctx, blob, whole);
        CHECK(n <= blob.size());
        if (n == 0) {
            n_refused++;
            CHECK(picture(ctx, 37) == before);
            if (n_refused % 16 == 0) {
                CHECK(go_on(1));
            }
        } else {
            n_taken++;
            const asrkf_stats s = stats_of(ctx);
            CHECK(s.tokens <= 1024 && uint64_t(s.active_cells) + s.frozen_cells == s.tokens);
            asrkf_clear_error();
            CHECK(go_on(1 + random() % 64) || *asrkf_last_error()); // positions may be at the end of all numbers by now
            picture(ctx, 61); // every row can be read
        }
        if (n > 0 || stats_of(ctx).tokens > 900) {
            llama_memory_clear(llama_get_memory(ctx), true);
            CHECK(load(ctx, good, whole) == good.size());
            CHECK(go_on(1));
        }
        before = picture(ctx, 37);
        if (n_failed_checks != n_failed && may_print()) {
            std::printf("\"%s\", %s state, seed %u, %s %u of %zu bytes\n", policy, whole ? "whole" : "sequence", seed, what, number, blob.size());
        }
    };
    before = picture(ctx, 37);
    // truncated: every short length, lengths by powers, the last bytes
    std::vector<size_t> sizes;
    for (size_t size = 0; size < 40; ++size) {
        sizes.push_back(size);
        sizes.push_back(good.size() - 1 - size);
    }
    for (double size = 40; size < double(good.size()); size *= 1.3) {
        sizes.push_back(size_t(size));
    }
    for (const size_t size : sizes) {
        try_one(bytes(good.begin(), good.begin() + std::ptrdiff_t(size)), "truncated to", uint32_t(size));
    }
    for (int i = 0; i < n_wanted; ++i) {
        random.seed(seed + uint32_t(i));
        bytes blob = damaged(good, other, random);
        if (whole && blob.size() >= 4) { // upstream believes the length of the architecture's name, up to 4 GiB, before it reads it
            blob[2] = blob[3] = 0;
        }
        try_one(blob, "damage", uint32_t(i));
    }
    CHECK(n_refused > 40);
    CHECK(n_wanted < 50 || n_taken > n_wanted/50); // rows may hold anything
    std::printf("     %s state of %zu bytes, \"%s\": %d refused, %d taken\n", whole ? "whole" : "sequence", good.size(), policy, n_refused, n_taken);
    llama_free(ctx);
}

} // namespace

TEST(state_fuzz, "a damaged state is refused and nothing changes, or it is read and decoding goes on") {
    const uint32_t seed = first_seed();
    const int n = n_cases(150);
    std::printf("     seed %u, %d states each\n", seed, n);
    for (const bool whole : { true, false }) {
        fuzz_states("asrkf,layers=0@256/1@512,window=64", whole, seed, n);
        fuzz_states("asrkf,pool=512,window=64,moves=staged,recall=mean_key", whole, seed, n);
        fuzz_states("paper,pool=256,window=64,tau=0.5", whole, seed, n);
    }
}

//
// leaks
//

namespace {

// Bytes of this process in RAM; 0 where the system does not say.
uint64_t resident_bytes() {
    std::ifstream file("/proc/self/status");
    for (std::string line; std::getline(file, line); ) {
        if (line.compare(0, 6, "VmRSS:") == 0) {
            return uint64_t(std::atoll(line.c_str() + 6)) << 10;
        }
    }
    return 0;
}

} // namespace

TEST(many_contexts, "contexts that are made and freed, also refused ones, leave nothing behind") {
    // a sanitized build keeps freed memory for a while, so RSS says nothing there; LeakSanitizer does, at the end
    const int n = SANITIZED ? 200 : 1000, n_before = n/10;
    static const char * const policies[] = { nullptr, "asrkf,pool=256,window=64", nullptr, "window,pool=256,window=64", "asrkf,layers=0@256/1@512,window=64,moves=staged", nullptr };
    uint64_t resident_before = 0, n_frozen = 0;
    for (int i = 0; i < n; ++i) {
        const char * policy = policies[i % 6];
        llama_context * ctx = make_context(policy, 512, 64);
        CHECK(ctx);
        if (ctx && i % 3 == 1) { // past the pool
            for (int t = 0; t < 6; ++t) {
                CHECK(decode(ctx, std::vector<llama_token>(64, t)) == 0);
            }
            n_frozen += stats_of(ctx).frozen_cells;
            if (i % 2) {
                const bytes blob = whole_state(ctx);
                CHECK(load(ctx, blob, true) == blob.size());
            }
        }
        llama_free(ctx);
        if (i % 10 == 0) {
            CHECK(make_context("asrkf,pool=4096", 512, 64) == nullptr);
        }
        if (i + 1 == n_before) {
            resident_before = resident_bytes();
        }
    }
    CHECK(n_frozen > 0);
    if (SANITIZED || resident_before == 0) {
        std::printf("     skipped: RSS after %d contexts (%s)\n", n, SANITIZED ? "a sanitized build keeps what is freed" : "no /proc/self/status");
        return;
    }
    const double grown_mib = (double(resident_bytes()) - double(resident_before)) / (1 << 20);
    std::printf("     RSS after %d contexts: %.1f MiB more than after %d\n", n, grown_mib, n_before);
    CHECK(grown_mib < 4);
}

TEST(state_positions, "a state with positions at the end of all numbers is refused, or can be asked about and decoded from") {
    llama_context * ctx = make_context("asrkf,pool=512,window=64", 1024, 64);
    CHECK(ctx && decode(ctx, std::vector<llama_token>(64, 1)) == 0);
    const bytes good = sequence_state(ctx);
    const int32_t last = 63;
    for (const int32_t pos : { HIGHEST, HIGHEST - 1, HIGHEST - 63, HIGHEST - 64, LOWEST, -1 }) {
        bytes blob = good;
        size_t n_found = 0;
        for (size_t i = 0; i + 4 <= std::min<size_t>(blob.size(), 4096) && n_found == 0; ++i) { // the last position, wherever the format has it
            if (std::memcmp(blob.data() + i, &last, 4) == 0) {
                std::memcpy(blob.data() + i, &pos, 4);
                n_found++;
            }
        }
        CHECK(n_found == 1);
        if (load(ctx, blob, false) > 0) {
            asrkf_freeze(ctx, 0, 10, 20, nullptr);
            asrkf_pin(ctx, 0, 10, -1);
            asrkf_unpin(ctx, 0, 0, -1);
            picture(ctx, 1);
            decode(ctx, { 1 });
            decode(ctx, { 1, 2, 3 });
            picture(ctx, 1);
        }
        llama_memory_clear(llama_get_memory(ctx), true);
        CHECK(load(ctx, good, false) == good.size() && decode(ctx, { 1 }) == 0);
    }
    llama_free(ctx);
}

int main() {
    llama_backend_init();
    const int failed = run_all_tests();
    llama_model_free(load_model());
    llama_backend_free();
    return failed;
}
