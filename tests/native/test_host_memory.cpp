// The RAM that may still be taken: of the machine, and in containers of both kinds.
#include "check.h"

#include "store/host_memory.h"

#include <filesystem>
#include <fstream>
#include <stdlib.h>

using namespace asrkf;

namespace {

constexpr uint64_t GIB = uint64_t(1) << 30;

struct machine {
    machine() {
        char name[] = "/tmp/asrkf-host-memory-XXXXXX";
        root = mkdtemp(name);
        put("/proc/meminfo", "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\n");
    }
    ~machine() { std::filesystem::remove_all(root); }
    void put(const std::string & path, const std::string & text) const {
        std::filesystem::create_directories(std::filesystem::path(root + path).parent_path());
        std::ofstream(root + path) << text;
    }
    uint64_t available() const { return available_ram(root); }

    std::string root;
};

} // namespace

TEST(no_container, "what the machine has available; where nothing is told, no bound") {
    machine m;
    CHECK(m.available() == 16*GIB);
    m.put("/proc/self/cgroup", "0::/user.slice/some.scope\n12:pids:/\nnonsense\n");
    CHECK(m.available() == 16*GIB);
    CHECK(available_ram("/nowhere") == UINT64_MAX);
    CHECK(available_ram() > 0);
}

TEST(version_2, "what a container's limit leaves; read files make room; the narrowest of the groups around it counts") {
    machine m;
    m.put("/proc/self/cgroup", "0::/\n");
    m.put("/sys/fs/cgroup/memory.max", "max\n");
    m.put("/sys/fs/cgroup/memory.current", "5368709120\n");
    CHECK(m.available() == 16*GIB);
    m.put("/sys/fs/cgroup/memory.max", "8589934592\n");
    CHECK(m.available() == 3*GIB);
    m.put("/sys/fs/cgroup/memory.stat", "anon 1\ninactive_file 2147483648\nactive_file 7\n");
    CHECK(m.available() == 5*GIB);
    m.put("/proc/self/cgroup", "0::/pod/container\n");
    CHECK(m.available() == 5*GIB); // its own folder is not there
    m.put("/sys/fs/cgroup/pod/memory.max", "4294967296\n");
    m.put("/sys/fs/cgroup/pod/memory.current", "1073741824\n");
    CHECK(m.available() == 3*GIB);
    m.put("/sys/fs/cgroup/pod/container/memory.max", "1073741824\n");
    m.put("/sys/fs/cgroup/pod/container/memory.current", "2147483648\n"); // over it
    CHECK(m.available() == 0);
}

TEST(version_1, "the same of the older form, whose limit may be a number that no machine has") {
    machine m;
    m.put("/proc/self/cgroup", "5:devices:/docker/1\n4:cpu,memory:/docker/1\n");
    m.put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    m.put("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1073741824\n");
    CHECK(m.available() == 16*GIB);
    m.put("/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "4294967296\n");
    m.put("/sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes", "3221225472\n");
    m.put("/sys/fs/cgroup/memory/docker/1/memory.stat", "cache 5\ntotal_inactive_file 1073741824\n");
    CHECK(m.available() == 2*GIB);
}

int main() { return run_all_tests(); }
