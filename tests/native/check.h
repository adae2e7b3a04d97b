// The least that a unit test needs: CHECK says where and what, main() returns how many failed.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

inline int n_failed_checks = 0;
inline int n_checks        = 0;

#define CHECK(condition)                                                              \
    do {                                                                              \
        ++n_checks;                                                                   \
        if (!(condition)) {                                                           \
            ++n_failed_checks;                                                        \
            std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
        }                                                                             \
    } while (0)

inline std::vector<std::pair<std::string, std::function<void()>>> & all_tests() {
    static std::vector<std::pair<std::string, std::function<void()>>> tests;
    return tests;
}

struct registered_test {
    registered_test(const char * name, std::function<void()> body) { all_tests().emplace_back(name, std::move(body)); }
};

#define TEST(identifier, name)                                           \
    static void identifier();                                            \
    static const registered_test identifier##_registered(name, identifier); \
    static void identifier()

// The text of what body throws, "" if it does not.
template <typename Body> std::string thrown(Body body) {
    try {
        body();
    } catch (const std::exception & e) {
        return e.what();
    }
    return "";
}

// ASRKF_TEST_ONLY: those whose name has this in it; "!this": those that have not.
inline int run_all_tests() {
    const char * only = std::getenv("ASRKF_TEST_ONLY");
    size_t n_run = 0, n_failed = 0;
    std::setvbuf(stdout, nullptr, _IOLBF, 0); // a test that crashes has said what came before
    for (const auto & [name, body] : all_tests()) {
        if (only && (name.find(only + (*only == '!')) == std::string::npos) == (*only != '!')) {
            continue;
        }
        n_run++;
        const int before = n_failed_checks;
        body();
        std::printf("%s %s\n", n_failed_checks == before ? "ok  " : "FAIL", name.c_str());
        n_failed += n_failed_checks != before;
    }
    std::printf("%zu passed, %zu failed (%d checks)\n", n_run - n_failed, n_failed, n_checks);
    return n_failed == 0 && n_checks > 0 ? 0 : 1;
}
