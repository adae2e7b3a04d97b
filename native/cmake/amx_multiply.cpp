// Two tiles multiplied on a worker thread, as ggml does it: permission is asked for on the main thread only. Exit status 0:
// the product is right. 1: it is wrong; 2: the kernel does not allow tiles; a signal says the rest.
#include <immintrin.h>

#include <cstdint>
#include <thread>

#if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

struct tile_config {
    uint8_t  palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t  rows[16] = {};
};

constexpr int N = 16, K = 64; // rows of a tile, bytes of a row

static int8_t  a[N][K], b[N][K];
static int32_t c[N][N];

// not inlined, as ggml's: else the compiler would see the whole life of the configuration
__attribute__((noinline)) static void load_config() {
    alignas(64) tile_config config = {};
    for (int t = 0; t < 3; ++t) {
        config.row_bytes[t] = K;
        config.rows[t]      = N;
    }
    _tile_loadconfig(&config);
}

static void multiply() {
    load_config();
    _tile_zero(0);
    _tile_loadd(1, a, K);
    _tile_loadd(2, b, K);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, c, N*sizeof(int32_t));
    _tile_release();
}

int main() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; // arch_prctl(2)
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) {
        return 2;
    }
#endif
    for (int i = 0; i < N; ++i) {
        for (int k = 0; k < K; ++k) {
            a[i][k] = int8_t(i - k % 7);
            b[i][k] = int8_t(k % 5 - i % 3);
        }
    }
    std::thread(multiply).join();
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < N; ++j) { // four neighbouring bytes of a row of B belong to one column
            int32_t sum = 0;
            for (int k = 0; k < K; ++k) {
                sum += a[i][k]*b[k / 4][4*j + k % 4];
            }
            if (c[i][j] != sum) {
                return 1;
            }
        }
    }
    return 0;
}
