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

  // Room for `capacity` rows; `set_rows` fills them, and packs the weights with the first.
  Prepared(const Engine<T>& engine, const Parallel& parallel, const Unit& unit, int64_t capacity)
      : engine(engine), parallel(parallel), work{}, unit_(unit) {
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
  }

  // Row first + r becomes rows.data[source[r]], or rows.data[r]. `first` is a multiple of lanes; the last panel is
  // filled up with zero rows.
  void set_rows(const Rows& rows, const int64_t* source, int64_t first = 0) {
    const int64_t lanes = engine.lanes, panels = engine.stride(rows.count) / lanes;
    const int64_t block = std::min(kPanelBlock, (panels + parallel.threads - 1) / parallel.threads);
    const auto parts = [&](int stage) {
      if (stage == 0) return packed_ ? 0 : engine.pack_parts(work);
      return block ? (panels + block - 1) / block : 0;
    };
    share_in_turn(parallel, 2, parts, [&](int64_t, int stage, int64_t part) {
      if (stage == 0) return engine.pack(work, unit_, part);
      const int64_t begin = part * block, count = std::min(block, panels - begin);
      const T* from[kPanelBlock * kMaxLanes];
      for (int64_t r = 0; r < count * lanes; ++r) {
        const int64_t row = begin * lanes + r;
        from[r] =
            row >= rows.count ? nullptr : static_cast<const T*>(rows.data) + (source ? source[row] : row) * work.dim;
      }
      engine.prepare_panels(work, from, first / lanes + begin, count);
    });
    packed_ = true;
  }

 private:
  const Unit& unit_;
  bool packed_ = false;
  Arena arena_;
};

}  // namespace pddm::cpu
