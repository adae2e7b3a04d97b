// A device whose backend does nothing until somebody waits for it: what is read too early is not there yet, and what is given
// back too early is used afterwards. Its memory is the host's, but it does not say so; its queue computes on ggml's CPU backend.
#pragma once

#include "delayed_queue.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"

#include <cstring>
#include <map>
#include <memory>

struct delaying_device {
    bool     has_events    = true;
    bool     uploads_first = false; // uploads have a queue of their own: at once, unless the backend was told to wait for an event
    bool     can_pin       = true;
    uint32_t fail_in       = 0;     // the n-th graph from now on fails
    uint32_t n_uploads = 0, n_graphs = 0, n_downloads = 0;

    delaying_device() : cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)) {
        device.iface.get_name             = [](ggml_backend_dev_t) { return "delaying"; };
        device.iface.get_buffer_type      = [](ggml_backend_dev_t dev) { return &of(dev).memory; };
        device.iface.get_host_buffer_type = [](ggml_backend_dev_t dev) { return &of(dev).pinned; };
        device.iface.supports_op          = [](ggml_backend_dev_t, const ggml_tensor *) { return true; };
        device.iface.supports_buft        = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == &of(dev).memory; };
        device.iface.event_new            = [](ggml_backend_dev_t dev) { return of(dev).has_events ? new ggml_backend_event{ dev, new delayed_event } : nullptr; };
        device.iface.event_free           = [](ggml_backend_dev_t, ggml_backend_event_t event) { delete static_cast<delayed_event *>(event->context); delete event; };
        device.iface.event_synchronize    = [](ggml_backend_dev_t, ggml_backend_event_t event) { static_cast<delayed_event *>(event->context)->synchronize(); };
        device.context = this;

        memory = { ggml_backend_cpu_buffer_type()->iface, &device, this };
        memory.iface.is_host      = nullptr;
        memory.iface.alloc_buffer = [](ggml_backend_buffer_type_t buft, size_t size) { return allocate(buft, size); };
        pinned = { ggml_backend_cpu_buffer_type()->iface, &device, this };
        pinned.iface.alloc_buffer = [](ggml_backend_buffer_type_t buft, size_t size) {
            const bool pins = static_cast<delaying_device *>(buft->context)->can_pin;
            return allocate(pins ? buft : ggml_backend_cpu_buffer_type(), size);
        };

        backend.iface.get_name         = [](ggml_backend_t) { return "delaying"; };
        backend.iface.set_tensor_async = [](ggml_backend_t b, ggml_tensor * t, const void * data, size_t offset, size_t n) {
            delaying_device & d = of(b->device);
            d.n_uploads++;
            auto * to = static_cast<uint8_t *>(t->data) + offset;
            const auto copy = [=] { std::memcpy(to, data, n); };
            d.uploads_first ? copy() : d.queue.later(copy);
        };
        backend.iface.get_tensor_async = [](ggml_backend_t b, const ggml_tensor * t, void * data, size_t offset, size_t n) {
            of(b->device).n_downloads++;
            const auto * from = static_cast<const uint8_t *>(t->data) + offset;
            of(b->device).queue.later([=] { std::memcpy(data, from, n); });
        };
        backend.iface.synchronize   = [](ggml_backend_t b) { of(b->device).queue.work(); };
        backend.iface.graph_compute = [](ggml_backend_t b, ggml_cgraph * graph) { return of(b->device).compute_later(graph); };
        backend.iface.event_record  = [](ggml_backend_t b, ggml_backend_event_t event) { static_cast<delayed_event *>(event->context)->record(of(b->device).queue); };
        backend.iface.event_wait    = [](ggml_backend_t b, ggml_backend_event_t event) {
            const auto * recorded = static_cast<delayed_event *>(event->context);
            if (of(b->device).uploads_first) { // of its two queues, the one waits for the other: work until then is the same
                recorded->synchronize();
            }
            recorded->hold_back(of(b->device).queue);
        };
        backend.device = &device;
    }
    delaying_device(const delaying_device &) = delete;

    delayed_queue            queue;
    ggml_backend             backend = {};
    ggml_backend_buffer_type memory = {}, pinned = {};

private:
    static delaying_device & of(ggml_backend_dev_t dev) { return *static_cast<delaying_device *>(dev->context); }
    static ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t buft, size_t size) {
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
        buffer->buft = buft;
        return buffer;
    }

    // A graph's tensors may go once it was given to a backend: they are copied.
    struct kept_graph {
        std::map<const ggml_tensor *, std::unique_ptr<ggml_tensor>> tensors;
        ggml_context_ptr ctx;
        ggml_cgraph *    graph = nullptr;

        ggml_tensor * keep(const ggml_tensor * t) {
            if (!t) {
                return nullptr;
            }
            auto & copy = tensors[t];
            if (!copy) {
                copy = std::make_unique<ggml_tensor>(*t);
                ggml_tensor * kept = copy.get();
                kept->view_src = keep(t->view_src);
                for (ggml_tensor * & src : kept->src) {
                    src = keep(src);
                }
            }
            return tensors[t].get();
        }
    };
    ggml_status compute_later(ggml_cgraph * graph) {
        n_graphs++;
        if (fail_in > 0 && --fail_in == 0) {
            return GGML_STATUS_FAILED;
        }
        auto kept = std::make_shared<kept_graph>();
        const int n = ggml_graph_n_nodes(graph);
        kept->ctx.reset(ggml_init({ ggml_graph_overhead_custom(size_t(n) + 1, false), nullptr, true }));
        kept->graph = ggml_new_graph_custom(kept->ctx.get(), size_t(n) + 1, false);
        for (int i = 0; i < n; ++i) {
            ggml_graph_add_node(kept->graph, kept->keep(ggml_graph_node(graph, i)));
        }
        queue.later([this, kept] { ggml_backend_graph_compute(cpu.get(), kept->graph); });
        return GGML_STATUS_SUCCESS;
    }

    ggml_backend_device device = {};
    ggml_backend_ptr    cpu;
};
