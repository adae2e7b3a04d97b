#include "scoring/device_scorers.h"

#include "scoring/by_device.h"

#include "scoring/scoring_graph.h"

#include <algorithm>
#include <set>

namespace asrkf {

thread_local uint32_t fail_scoring_in = 0;

device_scorers::device_scorers(const relevance & kept, const std::vector<scoring_shape> & largest, bool no_alloc) : n_rows(kept.rows()) {
    for (const device_part & part : parts_of(kept, largest, no_alloc)) {
        all.push_back({ make(part), part.buft, part.n_heads() });
        if (const std::string note = all.back().scorer->note(); !note.empty()) {
            to_say.push_back(note);
        }
    }
}

std::unique_ptr<device_scorer> device_scorers::make(const device_part & part) {
    for (const scorer_kind & kind : scorer_kinds()) {
        if (!kind.serves(part.device)) {
            continue;
        }
        try {
            return kind.make(part);
        } catch (const error & e) {
            if (e.status != ASRKF_UNSUPPORTED) {
                throw;
            }
            to_say.push_back(format("scores on %s are computed by the portable graph: %s", ggml_backend_dev_name(part.device), e.what()));
        }
    }
    return std::make_unique<scoring_graphs>(part);
}

size_t device_scorers::device_bytes() const {
    size_t n_bytes = 0;
    for (const member & m : all) {
        n_bytes += m.scorer->device_bytes();
    }
    return n_bytes;
}

std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> device_scorers::breakdown() const {
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> sizes;
    for (const member & m : all) {
        sizes.emplace_back(m.buft, m.scorer->device_bytes());
    }
    return sizes;
}

std::string device_scorers::kinds() const {
    std::set<std::string> names;
    for (const member & m : all) {
        names.insert(m.scorer->kind());
    }
    std::string text;
    for (const std::string & name : names) {
        text += (text.empty() ? "" : "+") + name;
    }
    return text;
}

void device_scorers::attach(const std::vector<ggml_backend_t> & backends) {
    for (member & m : all) {
        m.scorer->attach(backend_of(m.buft, backends));
    }
    attached = true;
}

void device_scorers::prepare(const scoring_shape & shape) {
    for (member & m : all) {
        m.scorer->prepare(shape);
    }
    n_scored = shape.n_scored;
}

void device_scorers::run(const scoring_inputs & in, float * out, float * out_missed) {
    if (fail_scoring_in > 0 && --fail_scoring_in == 0) {
        throw error(ASRKF_INTERNAL, "a fault that a test asked for");
    }
    for (member & m : all) {
        m.scorer->run(in, out, out_missed);
        out        += 2*size_t(n_scored);
        out_missed += m.n_heads;
    }
}

void device_scorers::before_writes() {
    for (member & m : all) {
        m.scorer->before_writes();
    }
}

void device_scorers::wait() {
    for (member & m : all) {
        m.scorer->wait();
    }
}

} // namespace asrkf
