// What the drivers (mining, matrix, top-k, nearest, gradient) need of an instruction set, and nothing of how it is
// done.
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
  int64_t rows;  // room, a multiple of lanes
  int64_t f_stride, a_stride;

  T *f, *f_panels;  // unit rows
  T *a, *a_panels;  // their W_v f

  void *w_u, *w_c;  // packed for the forward products
  T* w_v;           // packed for a
  T *b_u, *b_v, *b_c, *w_s;
  T b_s;
};

// Rows cut into panels of `lanes` columns: (panel, row, column), with room for `rows` of them.
template <class T>
struct Slab {
  T* data;
  int64_t rows;
};

// The way back, stage by stage. Each is a number of independent parts, and needs all of the one before it.
enum class Stage {
  unit_rows,      // f;                                       weights that chunks share, packed        the rows, once
  inputs,         // u                                        the pairs, chunk by chunk
  hidden,         // u' = relu(u W_uᵀ + b_u); with the first chunk, a = f W_vᵀ of the rows
  norms,          // û, v̂
  combined,       // c = [û ; v̂] W_cᵀ + b_c
  score,          // d_c = weight · w_s · [c > 0], in place;  db_c, dw_s
  back_combined,  // d[û ; v̂] = d_c W_c
  back_norms,     // d_u, d_v, in place: through the norms and the relus
  back_hidden,    // d|u| = d_u W_u;                          dW_c = d_cᵀ [û ; v̂], dW_u = d_uᵀ u, db_u, db_v
  to_rows,        // df and da of the rows, + and − d|u|, d_v
  back_rows,      // df += da W_v;                            dW_v = daᵀ f           the rows again, once
  back_unit_rows  // through f / ‖f‖, to where the gradient is wanted
};

// Numbers of one pair.
template <class T>
struct PairNumbers {
  T scale_u, scale_v;  // 1 and 1/2; with normalize_input 1/‖u‖ and 1/(2‖v‖)
  T norm_u, norm_v;    // of u' and v', clamped
  T pull_u, pull_v;    // on ‖u‖ and ‖v‖, for normalize_input only
};

// Everything of one backward call. W_v is linear before its relu, so its gradient waits until all pairs are in. With
// normalize_input a pair of nearly opposite rows has a da of 1/‖v‖, which cancels in dW_v but would take all other
// pairs' digits with it; there dW_v is summed by pairs, as dW_u is.
//
// Between chunks sums over pairs lie in tiles of (lanes outputs, lanes inputs), (panel of outputs, panel of inputs): a
// page of memory each, where rows of the gradient are a page apart. Weights that several chunks read are packed once.
// Both are null where one chunk has room for all pairs.
template <class T>
struct Backward {
  Unit unit;
  int64_t dim_panels, hidden_panels, combined_panels, threads;
  const T *b_u, *b_v, *b_c, *w_s;  // filled up with zeros to whole panels
  UnitGradient gradient;

  Rows rows;              // `count` rows that a pair names:
  const int64_t* source;  // data[source[r]], or data[r]
  T* d_rows;              // likewise; the others are left alone
  Slab<T> f, a, d_f, d_a;
  T* norm;

  int64_t pairs;  // of the chunk
  bool first;     // the parameters' gradients hold nothing yet
  bool last;      // and nothing comes after
  const int64_t *i, *j;
  const T* weight;              // upstream gradient
  Slab<T> u, v, uv, d_c, d_uv;  // v, over its norm, with normalize_input only
  Slab<T> d_input;              // d|u|
  PairNumbers<T>* numbers;

  T *packed_u, *packed_c;            // panels of outputs of W_u and of either half of W_c, (panel, input, lane),
  T *packed_back_u, *packed_back_c;  // and of inputs of both, (panel, output, lane)
  T *tiles_u, *tiles_v, *tiles_c;    // sums; of v with normalize_input only
};

// Bytes of the packed weights.
struct PackedSizes {
  int64_t w_u, w_c, w_v;
};

constexpr int64_t kMaxLanes = 32;

// Lists of every row of a batch: of products above its floor with rows of other classes, and of these rows. Numbers of
// rows and classes are T's, so that they travel as the products do.
template <class T>
struct ListsOf {
  T *values, *rows;  // (row, room)
  int64_t room;      // of lanes and a vector more than a list has when panels meet
  int32_t* sizes;
  const T* classes;  // a negative one takes no part
};

// A panel of rows whose dot products with those of another are looked through.
template <class T>
struct Side {
  const T* panel;  // (step, lane)
  int64_t first;   // of the rows
  const T* floors;
};

template <class T>
class Engine {
 public:
  int lanes;

  // Rows and panels are padded to a multiple of `lanes`.
  int64_t stride(int64_t width) const { return (width + lanes - 1) / lanes * lanes; }

  virtual PackedSizes packed_sizes(const Workspace<T>& w) const = 0;
  virtual int64_t block_groups(const Workspace<T>& w) const = 0;  // groups whose panels fit the second-level cache
  virtual int64_t score_scratch_bytes(const Workspace<T>& w, int64_t groups) const = 0;

  // Fills the packed weights; `part` of `pack_parts()` independent tasks.
  virtual int64_t pack_parts(const Workspace<T>& w) const = 0;
  virtual void pack(const Workspace<T>& w, const Unit& unit, int64_t part) const = 0;

  // Unit rows and W_v f of `count` panels of `lanes` rows as they came; a null row is zero.
  virtual void prepare_panels(const Workspace<T>& w, const T* const* rows, int64_t first, int64_t count) const = 0;

  // out[g · lanes + lane] = S of that pair.
  virtual void score(const Workspace<T>& w, const Group* groups, int64_t count, void* scratch, T* out) const = 0;

  virtual int64_t slab_rows(int64_t n) const = 0;  // room that a slab of n rows needs
  virtual int64_t stage_parts(const Backward<T>& b, Stage stage) const = 0;
  // `panel` has room for the longest packed panel: lanes · lanes · (the most panels a product runs over).
  virtual void run(const Backward<T>& b, Stage stage, int64_t part, T* panel) const = 0;

  // Rows [first, first + lanes) of a dense (n, dim) matrix as a panel, zero where it has ended.
  virtual void pack_rows(T* panel, const T* rows, int64_t n, int64_t dim, int64_t first) const = 0;
  // Every row of panel a with every row of panel b, which is another or the same; a product is offered to both rows.
  // Returns the size of the longest list that something was offered to.
  virtual int32_t meet(const ListsOf<T>& lists, const Side<T>& a, const Side<T>& b, int64_t dim) const = 0;
  // Dot products of the rows of panel a with those of panel b, (lanes, lanes), to the last bit those of panels that
  // meet.
  virtual void multiply(const T* a, const T* b, int64_t dim, T* out) const = 0;
  // The same of a row of a dense (n, dim) matrix with others of it.
  virtual void products(const T* rows, int64_t dim, int64_t row, const int32_t* others, int64_t count,
                        T* out) const = 0;
  // Finds a floor that `least` to `most` entries of a list are above, and leaves them; returns how many, or 0 where
  // values are too close together, and no entry is changed. There is room for a vector after them.
  virtual int64_t thin(T* values, T* rows, int64_t size, int64_t least, int64_t most, T* floor) const = 0;

  // The register tile's multiply-adds on registers alone, `rounds` times: the ceiling of every kernel. Returns the
  // floating-point operations; `sink` takes a number that depends on all of them.
  virtual int64_t spin(int64_t rounds, T* sink) const = 0;

 protected:
  explicit constexpr Engine(int lanes) : lanes(lanes) {}
  ~Engine() = default;
};

// Dot products of rows that were rounded, as whole numbers: several times as many a second as of floats.
class RoundedEngine {
 public:
  int lanes;
  const RoundedEngine* finer;  // one that rounds less, and is slower; or null

  // Of a row of a panel.
  virtual int64_t elements(int64_t dim) const = 0;
  // Entries that a list has room for beyond those that are wanted.
  virtual int64_t slack(int64_t dim) const = 0;
  // Rounds x / scale of a panel x, (step, lane), to numbers q; |x / scale| ≤ 32000. Lane by lane ‖x − scale q‖²; of a
  // row of a negative class all is 0.
  virtual void round(int32_t* rounded, const float* panel, const int32_t* classes, float scale, int64_t dim,
                     float* error) const = 0;
  // How far a product is at most from q · q, over ‖q‖ ‖q‖; and one more for its fraction.
  virtual double error(int64_t dim) const = 0;
  // As the engine's, by a thread that has called `begin` and will call `end`.
  virtual int32_t meet(const ListsOf<int32_t>& lists, const Side<int32_t>& a, const Side<int32_t>& b,
                       int64_t dim) const = 0;
  virtual void begin() const = 0;
  virtual void end() const = 0;
  // Finds a floor that `least` entries of a list are above, or up to `most` where that is quicker, or more where they
  // are equal; leaves those above it less the margin; returns how many. `floor` comes as one that all entries are
  // above, and there is room for a vector after them.
  virtual int64_t thin(int32_t* values, int32_t* rows, int64_t size, int64_t least, int64_t most, int32_t margin,
                       int32_t* floor) const = 0;

 protected:
  constexpr RoundedEngine(int lanes, const RoundedEngine* finer) : lanes(lanes), finer(finer) {}
  ~RoundedEngine() = default;
};

}  // namespace pddm::cpu

// The instruction sets, lowest first. An engine is null where its set has no such products.
#define PDDM_DECLARE_ENGINES(isa)              \
  namespace pddm::isa {                        \
  const cpu::Engine<float>* float32_engine();  \
  const cpu::Engine<double>* float64_engine(); \
  const cpu::Engine<float>* bfloat16_engine(); \
  const cpu::RoundedEngine* rounded_engine();  \
  }
PDDM_DECLARE_ENGINES(portable)
PDDM_DECLARE_ENGINES(avx2)
PDDM_DECLARE_ENGINES(avx512)
PDDM_DECLARE_ENGINES(avx512_bf16)
PDDM_DECLARE_ENGINES(amx)
