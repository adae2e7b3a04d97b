// The configuration table: parse, format, refuse.
#include "check.h"

#include "policy/config.h"

#include <cstring>

using namespace asrkf;

static bool says(const std::string & text, const char * part) {
    const bool found = text.find(part) != std::string::npos;
    if (!found) {
        std::printf("expected \"%s\" in \"%s\"\n", part, text.c_str());
    }
    return found;
}

TEST(round_trip, "every preset survives format and parse") {
    for (int32_t policy = ASRKF_POLICY_FULL; policy <= ASRKF_POLICY_KVZIP; ++policy) {
        asrkf_config c = config_default(policy);
        c.pool_cells = 2048;
        c.ema        = 0.85f;
        std::strcpy(c.pinned, "0-10+20-30");
        const std::string text = config_format(c);
        const asrkf_config again = config_parse(text);
        CHECK(config_format(again) == text);
        CHECK(again.ema == c.ema && again.policy == policy && again.pool_cells == 2048);
    }
}

TEST(pool_forms, "a pool is cells, a fraction or bytes") {
    CHECK(config_parse("asrkf,pool=2048").pool_cells == 2048);
    CHECK(config_parse("asrkf,pool=0.25").pool_ratio == 0.25f);
    CHECK(config_parse("asrkf,pool=1.0").pool_ratio == 1.0f);
    CHECK(config_parse("asrkf,pool=1").pool_cells == 1);
    CHECK(config_parse("asrkf,pool=512MiB").pool_bytes == 512ull << 20);
    CHECK(config_parse("asrkf,pool=1.5GB").pool_bytes == 1500000000ull);
}

TEST(pool_resolved, "cells and fractions round up to 256, bytes round down") {
    CHECK(resolve_pool(config_parse("asrkf,pool=2000"), 8192) == 2048);
    CHECK(resolve_pool(config_parse("asrkf,pool=0.25"), 8192) == 2048);
    CHECK(resolve_pool(config_parse("asrkf,pool=0.26"), 8192) == 2304);
    CHECK(resolve_pool(config_parse("asrkf,pool=2000"), 8192, true) == 2000 && resolve_pool(config_parse("asrkf,pool=20"), 8192, true) == 256);
    CHECK(says(thrown([] { resolve_pool(config_parse("asrkf,pool=9000"), 8192); }), "larger than n_ctx 8192"));
}

TEST(pool_of_bytes, "no pool, auto, bytes and a part of the F16 bytes are pools of bytes, which may choose their types; cells are not") {
    for (const char * text : { "asrkf", "asrkf,pool=auto", "window,pool=1GiB", "asrkf,pool=33%", "aggressive", "default", "quality" }) {
        CHECK(is_pool_of_bytes(config_parse(text)));
        CHECK(config_parse(std::string(text) + ",types=auto").types == TYPES_AUTO);
    }
    for (const char * text : { "asrkf,pool=2048", "asrkf,pool=0.25", "asrkf,layers=0@512/1@256" }) {
        CHECK(!is_pool_of_bytes(config_parse(text)) && !has_auto_pool(config_parse(text)));
        CHECK(says(thrown([&] { config_parse(std::string(text) + ",types=auto"); }), "types=auto chooses by bytes"));
    }
    CHECK(has_auto_pool(config_parse("asrkf")) && has_auto_pool(config_parse("asrkf,pool=512,pool=auto")));
    CHECK(!has_auto_pool(config_parse("default")) && !has_auto_pool(config_parse("asrkf,pool=1GiB")) && !has_auto_pool(config_parse("full")));
    CHECK(config_parse("aggressive").pool_f16_percent == 12.5f && config_parse("asrkf,pool=33.3%").pool_f16_percent == 33.3f);
    CHECK(says(thrown([] { config_parse("asrkf,pool=101%"); }), "at most 100%"));
    CHECK(says(config_format(config_parse("asrkf")), "pool=auto") && says(config_format(config_parse("default")), "pool=33.3%"));
    CHECK(config_parse(config_format(config_parse("asrkf,device_limit=8GiB"))).device_limit == 8ull << 30);
}

TEST(refusals, "errors name key, value and remedy") {
    CHECK(says(thrown([] { config_parse("asrfk,pool=1"); }), "did you mean \"asrkf\""));
    CHECK(says(thrown([] { config_parse("asrkf,pol=1"); }), "did you mean \"pool\""));
    CHECK(says(thrown([] { config_parse("asrkf,pool=0"); }), "must be positive"));
    CHECK(says(thrown([] { config_parse("asrkf,pool=-5"); }), "must be positive"));
    CHECK(says(thrown([] { config_parse("asrkf,pool=nan"); }), "not a number"));
    CHECK(says(thrown([] { config_parse("asrkf,pool=5XB"); }), "unknown unit"));
    CHECK(says(thrown([] { config_parse("asrkf,pool=1.5"); }), "at most 1.0"));
    CHECK(says(thrown([] { config_parse("asrkf,ema=1.5"); }), "ema=1.5 is out of range [0, 0.999]"));
    CHECK(says(thrown([] { config_parse("asrkf,interval=2.5"); }), "whole number"));
    CHECK(says(thrown([] { config_parse("refreekv,tolerance=1.5"); }), "tolerance=1.5 is out of range [0, 1]"));
    CHECK(says(thrown([] { config_parse("refreekv,tolerance=-0.01"); }), "out of range [0, 1]"));
    CHECK(says(thrown([] { config_parse("refreekv,rows=0"); }), "rows=0 is out of range [1, 64]"));
    CHECK(says(thrown([] { config_parse("refreekv,order=age"); }), "known: position, relevance"));
    CHECK(says(thrown([] { config_parse("refreekv,repeat=0.5"); }), "whole number"));
    CHECK(says(thrown([] { config_parse("asrkf,score=gate"); }), "use recall=off"));
    CHECK(says(thrown([] { config_parse("paper,score=gate"); }), "use kvzip"));
    CHECK(says(thrown([] { config_parse("asrkf,gate_threshold=0.1"); }), "use kvzip"));
    CHECK(thrown([] { config_parse("asrkf,score=gate,recall=off"); }).empty());
    CHECK(says(thrown([] { config_parse("refreekv,order=relevance,score=recency"); }), "order=relevance goes by scores"));
    CHECK(says(thrown([] { config_parse("asrkf,score=atention"); }), "did you mean \"attention\""));
    CHECK(says(thrown([] { config_parse("asrkf,pool"); }), "not key=value"));
    CHECK(says(thrown([] { config_parse("asrkf,pinned=5-3"); }), "empty range"));
    CHECK(says(thrown([] { config_parse("asrkf,layers=0-3"); }), "pool each"));
    CHECK(says(thrown([] { config_parse("asrkf,recall=mean_key,index=q4_0"); }), "index=f16 or auto"));
    CHECK(says(thrown([] { config_parse("paper,recall=mean_key"); }), "score=attention"));
    CHECK(says(thrown([] { config_parse("asrkf,look_share=0.6"); }), "look_share=0.6 is out of range [0, 0.5]"));
    CHECK(says(thrown([] { config_parse("asrkf,look_share=nan"); }), "not a number"));
    CHECK(says(thrown([] { config_parse("asrkf,look_trigger=mised"); }), "did you mean \"missed\""));
    for (const char * policy : { "asrkf,score=magnitude", "asrkf,recall=off", "window", "random", "paper,score=attention,recall=exact" }) {
        CHECK(says(thrown([&] { config_parse(policy + std::string(",recovery=second_look")); }), "it needs asrkf with score=attention"));
    }
    CHECK(says(thrown([] { config_parse("asrkf,pool=512,layers=0-3@256/4-5@256"); }), "drop one"));
    CHECK(says(thrown([] { config_parse("asrkf,pinned=" + std::string(1100, '1')); }), "longer than 1023"));
    CHECK(says(thrown([] { config_parse(""); }), "unknown"));
}

TEST(groups, "layer groups are read with their pools") {
    const auto specs = parse_groups("0-2+5@512/3-4@1024");
    CHECK(specs.size() == 2);
    CHECK(specs[0].pool_cells == 512 && specs[1].pool_cells == 1024);
    CHECK((specs[0].layers == ranges{ { 0, 2 }, { 5, 5 } }));
    CHECK(parse_groups("shared").empty());
}

TEST(garbage, "no string makes the parser crash") {
    unsigned state = 12345;
    const std::string alphabet = "asrkf,=poolwindow0123456789.-+@/eEGiB \xff";
    int n_refused = 0;
    for (int i = 0; i < 20000; ++i) {
        std::string text = i % 2 ? "asrkf," : "";
        for (unsigned n = (state = state*1664525u + 1013904223u) >> 27; n > 0; --n) {
            text += alphabet[(state = state*1664525u + 1013904223u) % alphabet.size()];
        }
        n_refused += !thrown([&] { config_parse(text); }).empty();
    }
    CHECK(n_refused > 10000);
}

int main() { return run_all_tests(); }
