#include "llama/saved_policies.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace asrkf {

namespace {

constexpr uint32_t STATE_VERSION = 1;

uint64_t checksum(const std::vector<uint8_t> & bytes) { // FNV-1a
    uint64_t hash = 14695981039346656037ull;
    for (const uint8_t byte : bytes) {
        hash = (hash ^ byte)*1099511628211ull;
    }
    return hash;
}

struct writer {
    void put(const void * data, size_t n) { bytes.insert(bytes.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n); }
    void put_u32(size_t value) {
        const uint32_t v = uint32_t(value);
        put(&v, sizeof(v));
    }
    std::vector<uint8_t> bytes;
};

struct reader {
    const uint8_t * take(size_t n) {
        if (n > bytes.size() - at) {
            unfit("it is damaged");
        }
        at += n;
        return bytes.data() + at - n;
    }
    uint32_t take_u32() {
        uint32_t value;
        std::memcpy(&value, take(sizeof(value)), sizeof(value));
        return value;
    }
    bool at_end() const { return at == bytes.size(); }

    std::vector<uint8_t> bytes;
    size_t               at = 0;
};

// The bytes behind mark and version, as the checksum says they were written.
std::vector<uint8_t> read_checked(llama_io_read_i & io, uint64_t most_bytes) {
    uint64_t size, sum;
    io.read(&size, sizeof(size));
    io.read(&sum, sizeof(sum));
    if (size > most_bytes) {
        unfit("it is damaged");
    }
    std::vector<uint8_t> bytes;
    while (bytes.size() < size) { // piece by piece: a damaged size must end at the end of the file, not in memory
        const size_t before = bytes.size();
        bytes.resize(size_t(std::min<uint64_t>(size, before + (1 << 20))));
        io.read(bytes.data() + before, bytes.size() - before);
    }
    if (checksum(bytes) != sum) {
        unfit("it is damaged");
    }
    return bytes;
}

} // namespace

void write_u32(llama_io_write_i & io, uint32_t value) { io.write(&value, sizeof(value)); }

uint32_t read_u32(llama_io_read_i & io) {
    uint32_t value;
    io.read(&value, sizeof(value));
    return value;
}

void unfit(const std::string & what) { throw error(ASRKF_INVALID_ARGUMENT, "the state does not fit this context: " + what); }

void write_policies(llama_io_write_i & io, const std::string & model_name, const std::vector<saved_sequence> & saved) {
    writer to;
    to.put_u32(model_name.size());
    to.put(model_name.data(), model_name.size());
    for (const saved_sequence & s : saved) {
        to.put_u32(s.id);
        to.put_u32(s.pinned.size());
        for (const auto & [p0, p1] : s.pinned) {
            to.put_u32(size_t(p0));
            to.put_u32(size_t(p1));
        }
        to.put_u32(s.rules.size());
        for (const std::vector<uint8_t> & rule : s.rules) {
            to.put_u32(rule.size());
            to.put(rule.data(), rule.size());
        }
    }
    const uint64_t size = to.bytes.size(), sum = checksum(to.bytes);
    write_u32(io, STATE_MARK);
    write_u32(io, STATE_VERSION);
    io.write(&size, sizeof(size));
    io.write(&sum, sizeof(sum));
    io.write(to.bytes.data(), to.bytes.size());
}

std::vector<saved_sequence> read_policies(llama_io_read_i & io, const std::string & model_name, uint64_t most_bytes) {
    if (const uint32_t version = read_u32(io); version != STATE_VERSION) {
        unfit(format("it is of version %u, this library reads %u", version, STATE_VERSION));
    }
    reader from = { read_checked(io, most_bytes) };
    const size_t n_name = from.take_u32();
    const std::string name(reinterpret_cast<const char *>(from.take(n_name)), n_name);
    if (name != model_name) {
        unfit(format("it is of another model (%s, this one is %s)", name.c_str(), model_name.c_str()));
    }
    std::vector<saved_sequence> saved;
    while (!from.at_end()) {
        saved_sequence s = { from.take_u32(), {}, {} };
        for (uint32_t n = from.take_u32(); n > 0; --n) {
            const uint32_t p0 = from.take_u32(), p1 = from.take_u32();
            if (p0 > p1 || p1 > uint32_t(std::numeric_limits<int32_t>::max())) {
                unfit("it is damaged");
            }
            s.pinned.emplace_back(int32_t(p0), int32_t(p1));
        }
        for (uint32_t n = from.take_u32(); n > 0; --n) {
            const size_t n_rule = from.take_u32();
            const uint8_t * rule = from.take(n_rule);
            s.rules.emplace_back(rule, rule + n_rule);
        }
        saved.push_back(std::move(s));
    }
    return saved;
}

} // namespace asrkf
