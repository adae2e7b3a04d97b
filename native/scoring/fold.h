// Sums and maxima over the second dimension of a tensor, by halves: ggml reduces along rows only, and turning a tensor around would
// cost more.
#pragma once

#include "ggml.h"

namespace asrkf {

// a + b, or the larger of each two: max(a, b) = relu(a - b) + b.
inline ggml_tensor * joined(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, bool maximum) {
    return maximum ? ggml_add(ctx, ggml_relu(ctx, ggml_sub(ctx, a, b)), b) : ggml_add(ctx, a, b);
}

// Of t [n, m, k]: [n, 1, k].
inline ggml_tensor * fold(ggml_context * ctx, ggml_tensor * t, bool maximum) {
    const auto part = [&](ggml_tensor * x, int64_t begin, int64_t n) {
        return ggml_view_3d(ctx, x, x->ne[0], n, x->ne[2], x->nb[1], x->nb[2], size_t(begin)*x->nb[1]);
    };
    ggml_tensor * rest = nullptr;
    while (t->ne[1] > 1) {
        const int64_t half = t->ne[1] / 2;
        if (t->ne[1] % 2) {
            ggml_tensor * last = part(t, t->ne[1] - 1, 1);
            rest = rest ? joined(ctx, rest, last, maximum) : last;
        }
        t = joined(ctx, part(t, 0, half), part(t, half, half), maximum);
    }
    return rest ? joined(ctx, t, rest, maximum) : t;
}

} // namespace asrkf
