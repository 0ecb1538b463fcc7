// Everything one call computes before the first pair: packed weights, unit rows, and a = W_v f. O(n · (dim + hidden)).
#pragma once

#include <algorithm>

#include "engine.h"
#include "memory.h"

namespace pddm::cpu {

constexpr int64_t kPanelBlock = 4;  // panels that share one pass of W_v through the caches

template <class T>
class Prepared {
 public:
  const Engine<T>& engine;
  const Parallel& parallel;
  Workspace<T> work;

  // Room for `capacity` rows; `set_rows` fills them.
  Prepared(const Engine<T>& engine, const Parallel& parallel, const Unit& unit, int64_t capacity)
      : engine(engine), parallel(parallel), work{} {
    Workspace<T>& w = work;
    w.dim = unit.dim, w.hidden = unit.hidden, w.combined = unit.combined;
    w.normalize_input = unit.normalize_input;
    w.rows = engine.stride(capacity);
    w.f_stride = engine.stride(unit.dim), w.a_stride = engine.stride(unit.hidden);
    w.f = arena_.take<T>(w.rows * w.f_stride), w.f_panels = arena_.take<T>(w.rows * w.f_stride);
    w.a = arena_.take<T>(w.rows * w.a_stride), w.a_panels = arena_.take<T>(w.rows * w.a_stride);
    const PackedSizes sizes = engine.packed_sizes(w);
    w.w_u = arena_.take_bytes(sizes.w_u), w.w_c = arena_.take_bytes(sizes.w_c);
    w.w_v = static_cast<T*>(arena_.take_bytes(sizes.w_v));
    w.b_u = arena_.take<T>(w.a_stride), w.b_v = arena_.take<T>(w.a_stride);
    w.b_c = arena_.take<T>(engine.stride(w.combined)), w.w_s = arena_.take<T>(engine.stride(w.combined));
    w.b_s = *static_cast<const T*>(unit.b_s);
    share(parallel, engine.pack_parts(w), [&](int64_t, int64_t part) { engine.pack(w, unit, part); });
  }

  // Row first + r becomes rows.data[source[r]], or rows.data[r]. `first` is a multiple of lanes; the last panel is
  // filled up with zero rows.
  void set_rows(const Rows& rows, const int64_t* source, int64_t first = 0) {
    const int64_t lanes = engine.lanes, panels = engine.stride(rows.count) / lanes;
    const int64_t block = std::min(kPanelBlock, (panels + parallel.threads - 1) / parallel.threads);
    share(parallel, block ? (panels + block - 1) / block : 0, [&](int64_t, int64_t b) {
      const int64_t begin = b * block, count = std::min(block, panels - begin);
      const T* from[kPanelBlock * kMaxLanes];
      for (int64_t r = 0; r < count * lanes; ++r) {
        const int64_t row = begin * lanes + r;
        from[r] =
            row >= rows.count ? nullptr : static_cast<const T*>(rows.data) + (source ? source[row] : row) * work.dim;
      }
      engine.prepare_panels(work, from, first / lanes + begin, count);
    });
  }

 private:
  Arena arena_;
};

}  // namespace pddm::cpu
