// The rule of `refreekv` (ReFreeKV, arXiv 2502.16886): how much of a prompt this input can do without, with no share to choose.
//
// Where a prompt has ended, the attention of its last query is looked at, layer by layer. Sinks do not count, neither in the norm
// nor in what it is compared with. Tokens go one after the other, the oldest first; of each head the L2 norm of the weights that
// are left falls with each. The mean of these norms over the heads, relative to where it began, is the loss, and as many tokens
// go as the loss stays within the tolerance. So the same rule freezes little of a text whose beginning is still looked at, and
// much of another. Layers that share a set of active tokens go by the mean of their losses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace asrkf {

class norm_cut {
public:
    // Token numbers: who may go, the first to go first, and who stays whatever the loss but counts.
    norm_cut(std::vector<uint32_t> may_go, std::vector<uint32_t> stay) : order(std::move(may_go)), stay(std::move(stay)), losses(order.size() + 1, 0) {}

    const std::vector<uint32_t> & may_go() const { return order; }
    // Attention of one more layer that shares the set: [head][token], n_tokens each.
    void add_layer(const std::vector<float> & weights, uint32_t n_tokens);
    // How many of them may go: the most whose loss is within the tolerance.
    size_t largest(float tolerance) const;

private:
    const std::vector<uint32_t> order, stay;
    std::vector<double>         losses; // by number of tokens that went, summed over layers
    uint32_t                    n_layers = 0;
};

// What a cut came to, in tokens.
struct cut_result {
    uint32_t n_tokens = 0; // there were
    uint32_t n_kept   = 0; // active afterwards
    uint32_t n_wanted = 0; // would be, if the pool were large enough
};

} // namespace asrkf
