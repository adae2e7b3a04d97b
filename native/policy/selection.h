// The n best of many, for decisions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace asrkf {

// Leave the n best in front.
template <typename Item, typename Better>
void select(std::vector<Item> & items, size_t n, Better better) {
    if (n > 0 && n < items.size()) {
        std::nth_element(items.begin(), items.begin() + std::ptrdiff_t(n), items.end(), better);
    }
}

// The n best of what is offered, one by one: most are refused by one comparison, against the worst of those that it keeps.
template <typename Item, typename Better>
class n_best {
public:
    n_best(size_t n, Better better) : n(n), better(better) {}

    void offer(const Item & item) {
        if (n == 0 || (is_full && !better(item, items[n - 1]))) {
            return;
        }
        items.push_back(item);
        if (items.size() >= 2*n + 64) {
            keep_best();
        }
    }
    bool has_all() const { return items.size() >= n; }
    const Item & last() { // of those n; there must be as many
        if (items.size() > n) {
            keep_best();
        }
        return *std::max_element(items.begin(), items.end(), better);
    }
    // The n_first best in any order, then the others, the best first.
    std::vector<Item> sorted_after(size_t n_first) {
        if (items.size() > n) {
            keep_best();
        }
        select(items, n_first, better);
        std::sort(items.begin() + std::ptrdiff_t(std::min(n_first, items.size())), items.end(), better);
        return std::move(items);
    }

private:
    void keep_best() {
        std::nth_element(items.begin(), items.begin() + std::ptrdiff_t(n - 1), items.end(), better);
        items.resize(n);
        is_full = true;
    }

    const size_t      n;
    const Better      better;
    bool              is_full = false; // items[n - 1] is the worst of the first n
    std::vector<Item> items;
};

} // namespace asrkf
