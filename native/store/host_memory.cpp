#include "store/host_memory.h"

#include <algorithm>
#include <fstream>
#include <sstream>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace asrkf {

namespace {

constexpr uint64_t UNTOLD = UINT64_MAX;

// The number behind a name: "name 123", or "name: 123 kB" in KiB.
uint64_t number_behind(const std::string & path, const std::string & name) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line); ) {
        std::istringstream words(line);
        std::string word, unit;
        uint64_t value = 0;
        if (words >> word && (word == name || word == name + ":") && words >> value) {
            return words >> unit && unit == "kB" ? value*1024 : value;
        }
    }
    return UNTOLD;
}

// Of a file with a number alone; "max" is none.
uint64_t number_in(const std::string & path) {
    std::ifstream file(path);
    uint64_t value = 0;
    return file >> value ? value : UNTOLD;
}

struct controller { const char * mount, * limit, * used, * reclaimable; }; // its files, and the line of memory.stat

constexpr controller VERSION_1 = { "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file" };
constexpr controller VERSION_2 = { "/sys/fs/cgroup",        "memory.max",            "memory.current",        "inactive_file"       };

// What the limits of a group and of those around it leave. Read files count as used there, though they make room for what needs it.
uint64_t left_in(const std::string & root, const controller & c, std::string group) {
    uint64_t left = UNTOLD;
    while (true) {
        const std::string folder = root + c.mount + group + "/";
        const uint64_t limit = number_in(folder + c.limit), used = number_in(folder + c.used);
        if (limit != UNTOLD && used != UNTOLD) {
            const uint64_t cached = number_behind(folder + "memory.stat", c.reclaimable);
            const uint64_t needed = used - std::min(used, cached == UNTOLD ? 0 : cached);
            left = std::min(left, limit - std::min(limit, needed));
        }
        if (group.empty()) {
            return left;
        }
        group.erase(group.rfind('/'));
    }
}

} // namespace

uint64_t available_ram(const std::string & root) {
    uint64_t bytes = number_behind(root + "/proc/meminfo", "MemAvailable");
    std::ifstream groups(root + "/proc/self/cgroup");
    for (std::string line; std::getline(groups, line); ) { // "4:memory:/path", or of version 2 "0::/path"
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        std::string group = line.substr(second + 1);
        if (group == "/" || group.empty() || group[0] != '/') {
            group.clear();
        }
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        if (controllers == ",,") {
            bytes = std::min(bytes, left_in(root, VERSION_2, group));
        } else if (controllers.find(",memory,") != std::string::npos) {
            bytes = std::min(bytes, left_in(root, VERSION_1, group));
        }
    }
    return bytes;
}

void give_back_freed_ram() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

} // namespace asrkf
