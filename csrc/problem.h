// The problem, stated once and without torch: what is asked, of which arrays, and what every backend must answer.
//
// Score of a pair (i, j) of unit rows f, with relu for σ and x / max(‖x‖, 1e-12) for every norm:
//
//     u  = |f_i − f_j|            v  = (f_i + f_j) / 2                       (dim)
//     u' = σ(W_u u + b_u)         v' = σ(W_v v + b_v)                        (hidden)
//     c  = σ(W_c [u'/‖u'‖ ; v'/‖v'‖] + b_c)                                  (combined)
//     S  = w_s · c + b_s
//
// Source: Huang, Loy, Tang, "Local Similarity-Aware Deep Feature Embedding", NIPS 2016, section 3.
#pragma once

#include <cstdint>

namespace pddm {

constexpr double kNormFloor = 1e-12;  // F.normalize's eps

// Of the two matrix products. Arrays are float64 for `float64` and float32 for all others, whose operands are rounded
// on their way into the product while sums stay float32. A backend may be more precise than it is asked to be.
enum class Precision { float32, float64, bfloat16, float16, tfloat32 };

// What to mine. `batch`: the hardest positive pair of the batch; `anchor`: every row with its own hardest positive;
// `pair`: every positive pair.
enum class Mode { batch = 0, anchor = 1, pair = 2 };

// Dense row-major feature rows; they need not be normalised.
struct Rows {
  const void* data;
  int64_t count;
};

// The eight parameters, dense and row-major, laid out as nn.Linear keeps them. `w_c` is (combined, 2 * hidden).
struct Unit {
  int64_t dim, hidden, combined;
  bool normalize_input;  // feed u/‖u‖ and v/‖v‖ instead of u and v
  const void *w_u, *b_u, *w_v, *b_v, *w_c, *b_c, *w_s, *b_s;
};

struct UnitGradient {
  void *w_u, *b_u, *w_v, *b_v, *w_c, *b_c, *w_s, *b_s;
};

// A list of pairs of rows.
struct Pairs {
  const int64_t *i, *j;
  int64_t count;
};

// Outputs of mining, `slots` long each: 1 for `batch`, n for `anchor`, the number of positive pairs for `pair`.
// A slot that is not valid has indices −1 and scores 0.
struct Quadruplets {
  int64_t slots;
  int64_t *i, *j, *k, *l;
  void *s_ij, *s_ik, *s_jl;
  bool* valid;
};

// The same as inputs of the loss; what is valid has rows for indices.
struct Picked {
  int64_t slots;
  const int64_t *i, *j, *k, *l;
  const void *s_ij, *s_ik, *s_jl;
  const bool* valid;
};

// Which hinges of a quadruplet are open, as bits.
enum Hinge : uint8_t { kScoreK = 1, kScoreL = 2, kDistanceK = 4, kDistanceL = 8 };

struct Margins {
  double alpha, beta, weight;  // of the scores, of the squared distances, and the weight of these
};

// Of every row a list of rows, in ascending order, −1 after: (rows, room). From entry `split` on it is a second list: a
// row that another one names in its first list has that one in its own first list or not at all.
struct Asked {
  const int64_t* lists;
  int64_t rows, room, split;

  // Of an entry, before its pair's place is known: whether it is none, the one that its pair is listed with, or the
  // pair is listed with the other row, with entry kOthers − place of its list.
  static constexpr int64_t kNone = -1, kOwn = -2, kOthers = -3;
};

// Of every row the best of a list, −1 and a score of 0 where there is none.
struct BestAsked {
  int64_t* rows;
  void* scores;
  bool* found;
};

// Calls body(context, 0..count-1) from the host framework's threads and returns when all have returned.
struct Parallel {
  int threads;
  void (*run)(int64_t count, void (*body)(void* context, int64_t index), void* context);
};

// What a backend does, on arrays in its own memory. Every call is complete in itself: nothing is kept from one to the
// next.
class Backend {
 public:
  // Pairs i < j with equal labels: how many slots `Mode::pair` has.
  virtual int64_t count_positive_pairs(const int64_t* labels, int64_t n) const = 0;

  virtual void mine(const Rows& rows, const int64_t* labels, const Unit& unit, Mode mode,
                    const Quadruplets& out) const = 0;

  // scores[p] = S(i[p], j[p]).
  virtual void score_pairs(const Rows& rows, const Pairs& pairs, const Unit& unit, void* scores) const = 0;

  // split < 0: scores is (n, n) over all rows. Otherwise rows[:split] against rows[split:].
  virtual void score_matrix(const Rows& rows, int64_t split, const Unit& unit, void* scores) const = 0;

  // For every query the k best gallery rows, best first, ties to the lowest index, NaN after everything else.
  virtual void topk(const Rows& queries, const Rows& gallery, int64_t k, const Unit& unit, void* scores,
                    int64_t* indices) const = 0;

  // Of each row of a matrix the columns of other classes with the `count` largest values, in ascending order, −1 where
  // there are fewer. NaN is the least, of equal ones the lowest columns are taken; a negative class takes no part.
  // `own` has the rows' classes.
  virtual void largest(const void* values, int64_t rows, int64_t columns, const int64_t* own, const int64_t* classes,
                       int64_t count, int64_t* indices) const = 0;

  // The pairs that lists name, each once: begins[r] of them are listed with a row before r, r from 0 to `rows`. Returns
  // how many there are; `places`, one for each entry of the lists, is for the other call.
  virtual int64_t count_asked(const Asked& asked, int64_t* begins, int64_t* places) const = 0;
  // These pairs, i ≤ j, and for each entry of the lists which is its pair, −1 for none.
  virtual void write_asked(const Asked& asked, const int64_t* begins, int64_t* i, int64_t* j,
                           int64_t* places) const = 0;
  // Of each first list, or second, the row with the largest of the pairs' `count` scores, or the lowest, that is no
  // NaN; of equal ones the first.
  virtual void best_asked(const Asked& asked, bool second, const int64_t* places, const void* scores, int64_t count,
                          bool lowest, const BestAsked& best) const = 0;
  // The quadruplet of each row with its best positive: k is its own best negative, l that one's.
  virtual void join_best(int64_t n, const BestAsked& positive, const BestAsked& negative,
                         const Quadruplets& out) const = 0;

  // Gradients of Σ_p weight[p] · S(i[p], j[p]). Pairs with a negative index or a zero weight are skipped.
  virtual void score_pairs_backward(const Rows& rows, const Pairs& pairs, const void* weight, const Unit& unit,
                                    void* rows_gradient, const UnitGradient& gradient) const = 0;

  // The same for every entry of score_matrix's output.
  virtual void score_matrix_backward(const Rows& rows, int64_t split, const void* weight, const Unit& unit,
                                     void* rows_gradient, const UnitGradient& gradient) const = 0;

  // The loss of mined quadruplets, one number, and which hinges are open, a byte for each.
  virtual void quadruplet_loss(const Rows& rows, int64_t dim, const Picked& quads, const Margins& margins, void* loss,
                               uint8_t* open) const = 0;

  // Gradients of it times `upstream`, one number, of the rows and of the three scores.
  virtual void quadruplet_loss_backward(const Rows& rows, int64_t dim, const Picked& quads, double embedding_weight,
                                        const void* upstream, const uint8_t* open, void* d_rows, void* d_s_ij,
                                        void* d_s_ik, void* d_s_jl) const = 0;

  virtual ~Backend() = default;
};

// A backend's since its last reset, over all threads: what the laws of speed are checked with.
struct Counters {
  int64_t pairs_scored;  // pairs whose score a forward or backward kernel computed, as often as it did
  int64_t bytes_peak;    // most scratch asked for and not given back
  int64_t launches;      // of kernels; 0 where there are none
  int64_t allocations;   // asked of the host framework; 0 where scratch is native
};

}  // namespace pddm
