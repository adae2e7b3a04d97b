/* asrkf.h as a C program sees it: C99-clean, and bad input gets a status and a text. */
#include "asrkf.h"

#include <stdio.h>
#include <string.h>

static int n_failed = 0, n_passed = 0;

static void check(int condition, const char * what) {
    if (condition) {
        n_passed++;
    } else {
        n_failed++;
        printf("FAIL %s (last error: %s)\n", what, asrkf_last_error());
    }
}

int main(void) {
    uint32_t layers[4] = { 0 };
    struct asrkf_config config, untouched;
    struct asrkf_stats stats;
    struct asrkf_field field;
    char text[4096];
    size_t i = 0, n = 0;
    uint64_t moved = 0;

    check(strlen(asrkf_version()) > 0, "there is a version");
    config.struct_size = sizeof(config) - 1;
    check(asrkf_config_parse("asrkf", &config) == ASRKF_INVALID_ARGUMENT, "a caller's struct of another size");
    check(asrkf_config_default(ASRKF_POLICY_ASRKF, &config) == ASRKF_INVALID_ARGUMENT, "and for the defaults");
    config.struct_size = sizeof(config);
    check(asrkf_config_parse(NULL, &config) == ASRKF_INVALID_ARGUMENT, "NULL text");
    check(asrkf_config_parse("asrkf", NULL) == ASRKF_INVALID_ARGUMENT, "NULL out");
    check(asrkf_config_parse("asrkf,pool=2048", &config) == ASRKF_OK && config.pool_cells == 2048, "a good string");
    untouched = config;
    check(asrkf_config_parse("asrkf,nonsense=1", &config) == ASRKF_INVALID_ARGUMENT, "an unknown key");
    check(strstr(asrkf_last_error(), "did you mean") != NULL, "the nearest key is named");
    check(memcmp(&config, &untouched, sizeof(config)) == 0, "a failing parse leaves out as it was");
    check(asrkf_config_format(&config, text, sizeof(text)) == ASRKF_OK && strncmp(text, "asrkf,pool=2048", 15) == 0, "format");
    check(asrkf_config_format(&config, text, 4) == ASRKF_INVALID_ARGUMENT, "a short buffer");
    config.struct_size = 3;
    check(asrkf_config_format(&config, text, sizeof(text)) == ASRKF_INVALID_ARGUMENT, "a wrong struct_size");
    check(asrkf_next_context(&config) == ASRKF_INVALID_ARGUMENT, "a wrong struct_size for a context");
    check(asrkf_next_context(NULL) == ASRKF_OK, "taking settings back");
    check(asrkf_config_default(99, &config) == ASRKF_INVALID_ARGUMENT, "an unknown policy");
    field.struct_size = sizeof(field);
    while (asrkf_config_field(i, &field) == ASRKF_OK) {
        check(field.name && field.doc && strlen(field.doc) > 0, "a documented key");
        i++;
    }
    check(i > 10, "the table has rows");
    stats.struct_size = sizeof(stats);
    check(asrkf_get_stats(NULL, &stats) == ASRKF_INVALID_ARGUMENT, "stats of NULL");
    check(asrkf_freeze(NULL, 0, 0, 1, &moved) == ASRKF_INVALID_ARGUMENT, "freeze on NULL");
    check(asrkf_restore(NULL, 0, 0, 1, NULL) == ASRKF_INVALID_ARGUMENT, "restore on NULL");
    check(asrkf_pin(NULL, 0, 0, 1) == ASRKF_INVALID_ARGUMENT, "pin on NULL");
    check(asrkf_get_pinned(NULL, 0, NULL, 0, &n) == ASRKF_INVALID_ARGUMENT, "pins of NULL");
    check(asrkf_get_tokens(NULL, 0, 0, NULL, NULL, 0, &n) == ASRKF_INVALID_ARGUMENT, "tokens of NULL");
    check(asrkf_trace(NULL, NULL, 0) == ASRKF_INVALID_ARGUMENT, "trace of NULL");
    check(asrkf_default_score_layers(30, layers, 2, &n) == ASRKF_OK && n == 4 && layers[0] == 6 && layers[1] == 13 && layers[2] == 0, "layers that score");
    check(asrkf_default_score_layers(0, layers, 4, &n) == ASRKF_INVALID_ARGUMENT, "layers of no model");
    check(asrkf_calibrate(NULL, NULL, 0, 0, NULL, NULL, NULL, layers, 0, &n, &n) == ASRKF_INVALID_ARGUMENT, "a calibration of no model");
    asrkf_clear_error();
    check(asrkf_last_error()[0] == 0, "a cleared error");
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}
