// How cells are split among layers.
#include "check.h"

#include "policy/budgets.h"
#include "policy/kept_attention.h"
#include "llama/calibration.h"

#include <algorithm>
#include <cstdio>
#include <fstream>

using namespace asrkf;

namespace {

std::vector<layer_budget> layers_with(const std::vector<double> & sensitivities) {
    std::vector<layer_budget> result;
    for (size_t i = 0; i < sensitivities.size(); ++i) {
        result.push_back({ uint32_t(i), sensitivities[i], 768 });
    }
    return result;
}

uint64_t cells_of(const std::vector<group_budget> & groups) {
    uint64_t n = 0;
    for (const group_budget & g : groups) {
        n += uint64_t(g.pool_cells)*g.layers.size();
    }
    return n;
}

} // namespace

TEST(loss, "the predicted loss is the sensitivity at a fifth, and nothing where all is active") {
    CHECK(predicted_loss(3, 0.2) == 3);
    CHECK(predicted_loss(3, 1) == 0);
    CHECK(predicted_loss(3, 0.1) > predicted_loss(3, 0.2));
}

TEST(each, "a budget per layer: the sensitive one gets most, equal ones are one group, the total is kept") {
    const auto groups = split_each(layers_with({ 1, 1, 20, 1, 5, 1, 1, 1 }), 1024, 256, 4096);
    CHECK(groups.size() == 3 || groups.size() == 4); // the last cells may go to one of the equal layers
    CHECK(cells_of(groups) <= 8*1024 && cells_of(groups) > 8*1024 - 256);
    std::vector<uint32_t> cells(8, 0);
    for (const group_budget & g : groups) {
        CHECK(g.pool_cells % POOL_PAD_CELLS == 0 && g.pool_cells >= 256 && g.pool_cells <= 4096);
        for (const uint32_t il : g.layers) {
            CHECK(cells[il] == 0);
            cells[il] = g.pool_cells;
        }
    }
    CHECK(std::count(cells.begin(), cells.end(), 0u) == 0);
    CHECK(cells[2] > cells[4] && cells[4] > cells[0]);
}

TEST(mean, "a mean between two multiples is used as far as whole units go, and no further") {
    const std::vector<double> sensitivities = { 1, 1, 20, 1, 5, 1, 1, 1 };
    uint64_t before = 0;
    for (uint32_t mean = 256; mean <= 1600; mean += 8) {
        const auto groups = split_each(layers_with(sensitivities), mean, 512, 4096);
        const uint64_t n = cells_of(groups);
        for (const group_budget & g : groups) {
            CHECK(g.pool_cells % POOL_PAD_CELLS == 0 && g.pool_cells >= std::min(512u, mean / 256*256));
        }
        CHECK(n <= 8*mean && n + 256 > 8*mean && n >= before);
        before = n;
    }
}

TEST(each_is_few, "with many cells the steps are larger, so that the groups stay few") {
    std::vector<double> sensitivities;
    for (int i = 0; i < 32; ++i) {
        sensitivities.push_back(1 + 0.5*i);
    }
    CHECK(split_each(layers_with(sensitivities), 8192, 256, 32768).size() <= 12);
}

TEST(two, "two groups: the sensitive layers and the others") {
    const auto groups = split_two(layers_with({ 1, 30, 1, 30, 1, 1, 1, 30 }), 1024, 256, 4096);
    CHECK(groups.size() == 2);
    CHECK((groups[0].layers == std::vector<uint32_t>{ 1, 3, 7 }));
    CHECK(groups[0].pool_cells > 1024 && groups[1].pool_cells < 1024);
    CHECK(cells_of(groups) <= 8*1024);
}

TEST(equal, "layers that do not differ stay together") {
    const auto groups = split_two(layers_with({ 2, 2, 2, 2 }), 1024, 256, 4096);
    CHECK(groups.size() == 1 && groups[0].pool_cells == 1024);
}

TEST(no_more_than_all, "no group gets more cells than the context has tokens") {
    for (const auto & g : split_each(layers_with({ 1, 1000, 1 }), 1536, 256, 2048)) {
        CHECK(g.pool_cells <= 2048);
    }
}

TEST(too_small, "a pool too small to be split is the same for all layers") {
    const auto groups = split_each(layers_with({ 1, 2 }), 256, 300, 4096);
    CHECK(groups.size() == 1 && groups[0].pool_cells == 256 && groups[0].layers.size() == 2);
}

TEST(scorers, "four layers by depth score where that was not measured, one in four in a model with few layers") {
    CHECK((default_scoring_layers(30) == std::vector<uint32_t> { 6, 13, 20, 28 }));
    CHECK((default_scoring_layers(16).size() == 4 && default_scoring_layers(15).size() == 3));
    CHECK((default_scoring_layers(8) == std::vector<uint32_t> { 3, 6 }));
    CHECK((default_scoring_layers(3) == std::vector<uint32_t> { 2 }));
    CHECK((default_scoring_layers(1) == std::vector<uint32_t> { 0 }));
    CHECK((default_scoring_layers(2) == std::vector<uint32_t> { 1 }));
}

TEST(side_file, "a side file is read, and anything else is refused with its path") {
    const std::string path = "calibration_of_test.json";
    const auto write = [&](const std::string & text) { std::ofstream(path) << text; };
    write(R"({"format": "asrkf-calibration", "version": 2, "model": "llama-0123", "sensitivities": [0.5, 0.25], "score_layers": [0, 1]})");
    const calibration found = read_calibration(path);
    CHECK(found.fingerprint == "llama-0123" && found.sensitivities.size() == 2 && found.sensitivities[1] == 0.25 && found.score_layers.size() == 2);
    for (const char * bad : { "", "{", "[]", R"({"format": "other", "version": 2, "model": "", "sensitivities": [], "score_layers": [0]})",
            R"({"format": "asrkf-calibration", "version": 1, "model": "", "sensitivities": [1], "score_layers": [0]})",
            R"({"format": "asrkf-calibration", "version": 2, "model": "x", "sensitivities": [1]})",
            R"({"format": "asrkf-calibration", "version": 2, "model": "x", "sensitivities": [1], "score_layers": []})",
            R"({"format": "asrkf-calibration", "version": 2, "model": "x", "sensitivities": [1, 2], "score_layers": [1, 0]})",
            R"({"format": "asrkf-calibration", "version": 2, "model": "x", "sensitivities": [1, -1], "score_layers": [0]})",
            R"({"format": "asrkf-calibration", "version": 2, "model": "x", "sensitivities": "many", "score_layers": [0]})" }) {
        write(bad);
        CHECK(thrown([&] { read_calibration(path); }).find(path) != std::string::npos);
    }
    std::remove(path.c_str());
    CHECK(thrown([&] { read_calibration(path); }).find("cannot be read") != std::string::npos);
}

TEST(shares, "shares of a pool are max-min fair: the modest get what they want, nobody less than an equal part of the rest") {
    CHECK((fair_shares(1000, { 5000 }) == std::vector<uint32_t>{ 1000 }));
    CHECK((fair_shares(1000, { 5000, 5000 }) == std::vector<uint32_t>{ 500, 500 }));
    CHECK((fair_shares(1000, { 5000, 100, 5000 }) == std::vector<uint32_t>{ 450, 100, 450 }));
    CHECK((fair_shares(1000, { 300, 100 }) == std::vector<uint32_t>{ 600, 400 })); // what is left is shared out, too
    CHECK(fair_shares(1000, {}).empty());
    for (uint32_t seed = 1; seed < 200; ++seed) {
        std::vector<uint32_t> demands;
        for (uint32_t i = 0; i < 1 + seed % 9; ++i) {
            demands.push_back(1 + (seed*2654435761u + i*40503u) % 900);
        }
        const std::vector<uint32_t> shares = fair_shares(1024, demands);
        uint32_t sum = 0;
        for (size_t i = 0; i < shares.size(); ++i) {
            sum += shares[i];
            CHECK(shares[i] >= std::min(demands[i], 1024/uint32_t(shares.size())));
        }
        CHECK(sum == 1024);
    }
}

// Of n_chunks chunks of 8 queries: all attention on tokens whose number leaves this rest when divided by 10.
chunk_attention attention_on(size_t n_chunks, uint32_t rest) {
    chunk_attention made;
    for (size_t chunk = 0; chunk < n_chunks; ++chunk) {
        std::vector<float> row(8*(chunk + 1), 0);
        for (size_t i = rest; i < row.size(); i += 10) {
            row[i] = 10.0f / float(row.size());
        }
        made.push_back(row);
    }
    return made;
}

TEST(kept, "of a history stay the sinks, a window of half of what is kept, and the tokens that the queries before attended to") {
    const chunk_attention attention = attention_on(60, 7);
    const std::vector<float> kept = kept_tokens(attention, 50, 8, 0.2f);
    CHECK(kept.size() == 408); // 400 before the chunk, and its own
    CHECK(std::count(kept.begin(), kept.begin() + 400, 1.0f) == 80 && std::count(kept.begin(), kept.end(), 0.0f) == 320);
    CHECK(std::count(kept.begin(), kept.begin() + 4, 1.0f) == 4 && std::count(kept.begin() + 360, kept.end(), 1.0f) == 48);
    for (size_t i = 7; i < 360; i += 10) {
        CHECK(kept[i] == 1.0f); // 36 of them, as many as there is room for
    }
}

int main() { return run_all_tests(); }
