// Walks over many pairs, block by block, with every thread's scratch made once.
//
// A plan names the pairs twice over: groups of a row against a full panel of rows, which need no gather, then ranges of
// single pairs, packed densely into groups of their own, for whatever is no full panel (diagonals, ragged ends, lists).
#pragma once

#include <algorithm>
#include <vector>

#include "workspace.h"

namespace pddm::cpu {

// Pairs (first + t, fixed) for t < count, range after range.
class Ranges {
 public:
  void add(int64_t fixed, int64_t first, int64_t count) {
    if (count <= 0) return;
    ranges_.push_back({fixed, first});
    ends_.push_back(size() + count);
  }
  int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }

  // Pairs [from, from + count) of the whole.
  void write(int64_t from, int64_t count, int64_t* i, int64_t* j) const {
    size_t at = std::upper_bound(ends_.begin(), ends_.end(), from) - ends_.begin();
    for (int64_t t = 0; t < count; ++at) {
      const int64_t begin = at ? ends_[at - 1] : 0;
      for (; t < count && from + t < ends_[at]; ++t) {
        i[t] = ranges_[at].first + (from + t - begin);
        j[t] = ranges_[at].fixed;
      }
    }
  }

 private:
  struct Range {
    int64_t fixed, first;
  };
  std::vector<Range> ranges_;
  std::vector<int64_t> ends_;
};

// A list as it stands.
class Listed {
 public:
  explicit Listed(const Pairs& pairs) : pairs_(pairs) {}
  int64_t size() const { return pairs_.count; }
  void write(int64_t from, int64_t count, int64_t* i, int64_t* j) const {
    std::copy_n(pairs_.i + from, count, i);
    std::copy_n(pairs_.j + from, count, j);
  }

 private:
  Pairs pairs_;
};

// Panels [first_panel, first_panel + panels): against each of `rows`, or, with `triangle`, against every row before the
// panel.
struct PanelGroups {
  std::vector<int64_t> rows;
  int64_t first_panel = 0, panels = 0;
  bool triangle = false;
};

template <class Single>
struct Plan {
  PanelGroups panels;
  Single singles;
};

class PanelWalk {
 public:
  PanelWalk(const PanelGroups& p, int lanes) : p_(p), lanes_(lanes), rows_(int64_t(p.rows.size())) {}
  int64_t size() const { return p_.triangle ? lanes_ * p_.panels * (p_.panels - 1) / 2 : rows_ * p_.panels; }
  void at(int64_t t, int64_t* row, int64_t* panel) const {
    if (!p_.triangle) {
      *panel = p_.first_panel + t / rows_, *row = p_.rows[t % rows_];
      return;
    }
    int64_t low = 1, high = p_.panels - 1;  // the last panel whose groups start at or before t
    while (low < high) {
      const int64_t mid = (low + high + 1) / 2;
      if (lanes_ * mid * (mid - 1) / 2 <= t) {
        low = mid;
      } else {
        high = mid - 1;
      }
    }
    *panel = low, *row = t - lanes_ * low * (low - 1) / 2;
  }

 private:
  const PanelGroups& p_;
  int lanes_;
  int64_t rows_;
};

// All pairs i < j (i ≤ j with `diagonal`) of n rows.
inline Plan<Ranges> triangle_plan(int64_t n, int lanes, bool diagonal) {
  Plan<Ranges> plan;
  plan.panels.panels = n / lanes;
  plan.panels.triangle = true;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t first = j / lanes < n / lanes ? j / lanes * lanes : 0;
    plan.singles.add(j, first, j - first + (diagonal ? 1 : 0));
  }
  return plan;
}

// Rows against columns [first, first + count), first a multiple of lanes. The pairs come as (row, column) from panels
// and as (column, row) from the ranges.
inline Plan<Ranges> rectangle_plan(std::vector<int64_t> rows, int64_t first, int64_t count, int lanes) {
  Plan<Ranges> plan;
  const int64_t full = count / lanes * lanes;
  for (const int64_t r : rows) plan.singles.add(r, first + full, count - full);
  plan.panels = {std::move(rows), first / lanes, count / lanes, false};
  return plan;
}

// use(worker, group, at, scores) for every group of the plan, with a score for each lane. `at` is the position of the
// first pair among the singles, −1 for a panel's group.
template <class T, class Single, class Use>
void scan(const Prepared<T>& p, const Plan<Single>& plan, const Use& use) {
  const int lanes = p.engine.lanes;
  const PanelWalk walk(plan.panels, lanes);
  const int64_t panel_groups = walk.size();
  const int64_t groups = panel_groups + (plan.singles.size() + lanes - 1) / lanes;
  if (groups == 0) return;
  // Blocks of one size, give or take a group: as few as fit the cache, and as many for each thread.
  const int64_t most = p.parallel.threads * p.engine.block_groups(p.work);
  const int64_t blocks = std::min(groups, p.parallel.threads * ((groups + most - 1) / most));
  const int64_t block = (groups + blocks - 1) / blocks, threads = workers(p.parallel, blocks);

  struct Own {
    void* scratch;
    T* scores;
    int64_t *i, *j;
    Group* groups;
  };
  Arena arena;
  std::vector<Own> own(static_cast<size_t>(threads));
  for (Own& o : own) {
    o.scratch = arena.take_bytes(p.engine.score_scratch_bytes(p.work, block));
    o.scores = arena.take<T>(block * lanes);
    o.i = arena.take<int64_t>(block * lanes);
    o.j = arena.take<int64_t>(block * lanes);
    o.groups = arena.take<Group>(block);
  }

  share(p.parallel, blocks, [&](int64_t worker, int64_t b) {
    const Own& o = own[static_cast<size_t>(worker)];
    const int64_t first = b * groups / blocks, count = (b + 1) * groups / blocks - first;
    int64_t pairs = 0;
    for (int64_t g = 0; g < count; ++g) {
      Group& group = o.groups[g];
      if (first + g < panel_groups) {
        group = {0, 0, nullptr, nullptr, lanes};
        walk.at(first + g, &group.row, &group.panel);
      } else {
        int64_t *i = o.i + g * lanes, *j = o.j + g * lanes;
        const int64_t from = (first + g - panel_groups) * lanes;
        const int64_t valid = std::min<int64_t>(lanes, plan.singles.size() - from);
        plan.singles.write(from, valid, i, j);
        std::fill(i + valid, i + lanes, i[0]), std::fill(j + valid, j + lanes, j[0]);
        group = {0, -1, i, j, static_cast<int>(valid)};
      }
      pairs += group.count;
    }
    p.engine.score(p.work, o.groups, count, o.scratch, o.scores);
    count_pairs(pairs);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t at = first + g < panel_groups ? -1 : (first + g - panel_groups) * lanes;
      use(worker, o.groups[g], at, o.scores + g * lanes);
    }
  });
}

struct RowPair {
  int64_t i, j;
};

inline RowPair pair_of(const Group& g, int lanes, int lane) {
  if (g.panel >= 0) return {g.row, g.panel * lanes + lane};
  return {g.i[lane], g.j[lane]};
}

// Of a rectangle plan's group.
inline RowPair row_and_column(const Group& g, int lanes, int lane) {
  if (g.panel >= 0) return {g.row, g.panel * lanes + lane};
  return {g.j[lane], g.i[lane]};
}

}  // namespace pddm::cpu
