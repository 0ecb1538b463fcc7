// What the drivers (mining, matrix, top-k, gradient) need of an instruction set, and nothing of how it is done.
//
// The kernels behind it are compiled once per instruction set; the drivers once, for the baseline. Pairs travel in
// groups of `lanes`: either a row against a whole panel of consecutive rows (no gather), or any listed pairs.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace pddm::cpu {

struct Group {
  int64_t row;           // the row set against a panel, or
  int64_t panel;         // −1: the pairs are listed
  const int64_t *i, *j;  // listed pairs, `lanes` of each; those past `count` repeat a valid pair
  int count;             // of scores somebody wants
};

// Where everything of one call lies. T is float or double, `Element` what the products eat (see the engine's sizes).
// Strides: rows of f are `f_stride` long, rows of a `a_stride`; a panel is (stride, lanes), rows as columns.
template <class T>
struct Workspace {
  int64_t dim, hidden, combined;
  bool normalize_input;
  int64_t rows, used;  // room, a multiple of lanes, and how many of them a backward call has filled
  int64_t f_stride, a_stride;

  T *f, *f_panels;  // unit rows
  T *a, *a_panels;  // their W_v f
  T* inverse_norm;  // of the rows as they came; a clamped norm gives 1 / kNormFloor

  void *w_u, *w_c;  // packed for the forward products
  T* w_v;           // packed for a
  T *b_u, *b_v, *b_c, *w_s;
  T b_s;

  T *w_c_t, *w_u_t, *w_v_rows;  // packed for the backward products; null in a forward call
};

// One chunk of pairs on its way back. Everything is (group, row, lane) unless said otherwise.
template <class T>
struct Chunk {
  int64_t pairs, groups, capacity;  // capacity: pairs the buffers were made for
  bool first;                       // the weights' gradients hold nothing yet
  const int64_t *i, *j;             // groups · lanes long
  const T* weight;                  // upstream gradient, 0 in the lanes past `pairs`
  T *d_c, *d_u, *d_v;               // at W_c's, W_u's and W_v's outputs, the latter two scaled as their inputs are
  T *u, *v, *uv;                    // inputs of W_u, W_v and W_c, in strips of `lanes` columns: (strip, pair, column)
  T *row_f, *row_a;                 // (pair, stride): to add to row i (and, signed, to row j)
  T* pull;                          // (pair): the pull on ‖v‖; with d_v and v, for normalize_input only
  T* sums;                          // (group, SumOffsets::stride): sums over the lanes
};

// A gradient of (padded_outputs, a multiple of lanes) somewhere in memory.
template <class T>
struct Strided {
  T* data;
  int64_t stride;
};

// Gradient accumulators of a backward call.
template <class T>
struct Gradient {
  T *f, *a;                           // (rows of the workspace, their stride)
  Strided<T> w_u, w_v, w_c_u, w_c_v;  // W_c's two halves apart
  T* sums;                            // see SumOffsets
};

// Bytes of the packed weights: the forward ones, then those that only a backward call needs.
struct PackedSizes {
  int64_t w_u, w_c, w_v, w_c_t, w_u_t;
};

// Where each parameter's gradient lies among the sums.
struct SumOffsets {
  int64_t b_u, b_v, b_c, w_s, b_s, stride;
};

constexpr int64_t kMaxBackwardGroups = 4;
constexpr int64_t kMaxLanes = 32;

template <class T>
class Engine {
 public:
  int lanes;

  // Rows and panels are padded to a multiple of `lanes`.
  int64_t stride(int64_t width) const { return (width + lanes - 1) / lanes * lanes; }

  virtual PackedSizes packed_sizes(const Workspace<T>& w) const = 0;
  virtual int64_t padded_outputs(int64_t n) const = 0;            // outputs a packed matrix has room for
  virtual int64_t block_groups(const Workspace<T>& w) const = 0;  // groups whose panels fit the second-level cache
  virtual int64_t score_scratch_bytes(const Workspace<T>& w, int64_t groups) const = 0;
  virtual int64_t backward_scratch_bytes(const Workspace<T>& w, int64_t groups) const = 0;

  // Fills the packed weights; `part` of `parts()` independent tasks.
  virtual int64_t pack_parts(const Workspace<T>& w) const = 0;
  virtual void pack(const Workspace<T>& w, const Unit& unit, int64_t part) const = 0;

  // Unit rows and W_v f of `count` panels of `lanes` rows as they came; a null row is zero.
  virtual void prepare_panels(const Workspace<T>& w, const T* const* rows, int64_t first, int64_t count) const = 0;

  // out[g · lanes + lane] = S of that pair.
  virtual void score(const Workspace<T>& w, const Group* groups, int64_t count, void* scratch, T* out) const = 0;

  virtual SumOffsets sum_offsets(const Workspace<T>& w) const = 0;
  // Recomputes groups [first, first + count) of the chunk and leaves their gradients in its buffers.
  virtual void backward(const Workspace<T>& w, const Chunk<T>& chunk, int64_t first, int64_t count,
                        void* scratch) const = 0;
  // Adds the chunk to the gradient; every output belongs to one of the `reduce_parts` tasks.
  virtual int64_t reduce_parts(const Workspace<T>& w) const = 0;
  virtual void reduce(const Workspace<T>& w, const Chunk<T>& chunk, const Gradient<T>& g, int64_t part) const = 0;
  // After the last chunk: W_v's gradient, and the rows' through W_v and the normalisation, left in g.f.
  virtual int64_t finish_parts(const Workspace<T>& w) const = 0;
  virtual void finish(const Workspace<T>& w, const Gradient<T>& g, int64_t part) const = 0;

  // The register tile's multiply-adds on registers alone, `rounds` times: the ceiling of every kernel. Returns the
  // floating-point operations; `sink` takes a number that depends on all of them.
  virtual int64_t spin(int64_t rounds, T* sink) const = 0;

 protected:
  explicit constexpr Engine(int lanes) : lanes(lanes) {}
  ~Engine() = default;
};

}  // namespace pddm::cpu

// The instruction sets, lowest first. An engine is null where its set has no such precision.
#define PDDM_DECLARE_ENGINES(isa)              \
  namespace pddm::isa {                        \
  const cpu::Engine<float>* float32_engine();  \
  const cpu::Engine<double>* float64_engine(); \
  const cpu::Engine<float>* bfloat16_engine(); \
  }
PDDM_DECLARE_ENGINES(portable)
PDDM_DECLARE_ENGINES(avx2)
PDDM_DECLARE_ENGINES(avx512)
PDDM_DECLARE_ENGINES(avx512_bf16)
#undef PDDM_DECLARE_ENGINES
