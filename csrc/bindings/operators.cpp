// The operators: torch tensors in, the problem of problem.h out. Everything here is LibTorch's stable ABI, so that one
// build serves later torch releases. Shapes, dtypes and devices are checked in Python, where a message can name the
// caller's argument; what is checked again here keeps a direct call of the operator memory-safe.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/backend.h"
#if defined(PDDM_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/backend.h"
#endif
#include "threads.h"

#if defined(__linux__)
// Of torch 2.11 and later; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace pddm {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

Precision precision_of(const Tensor& feats, bool allow_tf32) {
  switch (feats.scalar_type()) {
    case ScalarType::Double: return Precision::float64;
    case ScalarType::BFloat16: return Precision::bfloat16;
    case ScalarType::Half: return Precision::float16;
    case ScalarType::Float: return allow_tf32 ? Precision::tfloat32 : Precision::float32;
    default: STD_TORCH_CHECK(false, "pddm: features must be float32, float64, bfloat16 or float16");
  }
}

ScalarType storage_of(Precision precision) {
  return precision == Precision::float64 ? ScalarType::Double : ScalarType::Float;
}

// The stable ABI looks an operator up by its name at every call, a microsecond that small batches would notice by the
// dozen: what has nothing to do calls none, and memory comes from a function.
Tensor dense(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() != dtype) return dense(torch::stable::to(t, dtype), dtype);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// From so many bytes on the C library may ask the system for memory and give it back at every call. On the CPU tensors
// of this size lie in what earlier ones have left, where that is no more than an eighth larger.
constexpr int64_t kReusedBytes = 128 << 10;

#if defined(__linux__)
struct Leave {
  void operator()(cpu::Block* block) const {
    cpu::leave_block(*block);
    delete block;
  }
};
#endif

// Dense, to be filled, on the device of `like`.
Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = sizes.size(); k-- > 0; stride *= std::max<int64_t>(1, sizes[k])) strides[k] = stride;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int64_t dims = int64_t(sizes.size());
  AtenTensorHandle made = nullptr;
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
  const int64_t bytes = stride * int64_t(aoti_torch_dtype_element_size(type));
  if (torch_from_blob && like.is_cpu() && bytes >= kReusedBytes && bytes <= cpu::kKeptBytes) {
    std::unique_ptr<cpu::Block, Leave> block(new cpu::Block(cpu::take_block(bytes, bytes + bytes / 8)));
    const auto leave = [](void*, void* context) { Leave()(static_cast<cpu::Block*>(context)); };
    TORCH_ERROR_CODE_CHECK(torch_from_blob(block->memory, dims, sizes.data(), strides.data(), 0, type, device,
                                           like.get_device_index(), &made, aoti_torch_layout_strided(), nullptr, 0,
                                           leave, block.get()));
    block.release();
    return Tensor(made);
  }
#endif
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), type, device, like.get_device_index(), &made));
  return Tensor(made);
}
Tensor empty(const Tensor& like, Sizes sizes) { return empty(like, sizes, like.scalar_type()); }

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device() == b.get_device();
}

void run_in_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) body(context, index);
  });
}

}  // namespace

Parallel torch_threads() { return {static_cast<int>(torch::stable::get_num_threads()), run_in_parallel}; }

namespace {

#if defined(PDDM_CUDA) && !defined(PDDM_EMULATED)
// Looked up in the library that torch has loaded if it has CUDA, so that one build also loads where torch has none.
void* current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "pddm: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}
#endif

// What every operator does first: which backend answers, on which device and stream, in which precision. Every backend
// has its own way to scratch memory: the CPU's is native, another's is tensors that live as long as the call.
class Call {
 public:
  Precision precision;
  ScalarType dtype;
  std::unique_ptr<const Backend> backend;
  bool on_host = true;  // what tensors point to can be read here

  Call(const Tensor& feats, bool allow_tf32) : Call(feats, precision_of(feats, allow_tf32)) {
    STD_TORCH_CHECK(feats.dim() == 2, "pddm: features must be a matrix");
  }
  Call(const Tensor& like, Precision wanted) : precision(wanted), dtype(storage_of(precision)), like_(&like) {
#if defined(PDDM_CUDA)
    caller_ = {0, nullptr, allocate, this, kSlab};
#if defined(PDDM_EMULATED)
    backend = cuda::make_backend(precision, caller_);
    return;
#else
    if (!like.is_cpu()) {
      on_host = false;
      caller_.device = like.get_device();
      guard_.emplace(caller_.device);
      caller_.stream = current_stream(caller_.device);
      backend = cuda::make_backend(precision, caller_);
      return;
    }
#endif
#endif
    parallel_ = torch_threads();
    backend = cpu::make_backend(precision, parallel_);
  }
  Call(const Call&) = delete;

  // Whether it is where the call's arrays are.
  bool owns(const Tensor& t) const { return same_device(t, *like_); }

#if defined(PDDM_CUDA)
#if defined(PDDM_EMULATED)
  bool has_device() const { return true; }
#else
  bool has_device() const { return !on_host; }
#endif
  // Where there is one.
  const cuda::DeviceBackend& device() const { return static_cast<const cuda::DeviceBackend&>(*backend); }
#endif

  static Rows rows(const Tensor& dense) { return {dense.const_data_ptr(), dense.size(0)}; }

 private:
  const Tensor* like_;  // the caller's
  Parallel parallel_{};
#if defined(PDDM_CUDA)
  // Of a small batch's scratch, which is then one allocation.
  static constexpr int64_t kSlab = 1 << 20;

  // The allocator may hand the memory on as soon as the call returns: work on the same stream comes after ours.
  static void* allocate(void* context, int64_t bytes) {
    auto& self = *static_cast<Call*>(context);
    self.scratch_.push_back(empty(*self.like_, {bytes}, ScalarType::Byte));
    return self.scratch_.back().mutable_data_ptr();
  }

  cuda::Caller caller_{};
  std::vector<Tensor> scratch_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// Tensors, dense and in another dtype, and copies; a device fills what it makes all at once, by run().
class Conversions {
 public:
  explicit Conversions(const Call& call) : call_(call) {}

  Tensor dense(const Tensor& t, ScalarType dtype) {
#if defined(PDDM_CUDA)
    const std::optional<cuda::Number> from = number(t.scalar_type()), to = number(dtype);
    if (call_.has_device() && from && to && from != to && t.is_contiguous()) {
      STD_TORCH_CHECK(call_.owns(t), "pddm: tensors must be on one device");
      Tensor made = empty(t, t.sizes(), dtype);
      add(t, made.mutable_data_ptr(), *from, *to);
      return made;
    }
#endif
    return pddm::dense(t, dtype);
  }
  // Into a dense tensor, from element `at` on.
  void copy(const Tensor& t, Tensor& into, int64_t at) {
    const Tensor from = pddm::dense(t, into.scalar_type());
    const int64_t size = into.element_size();
    auto* const to = static_cast<unsigned char*>(into.mutable_data_ptr()) + at * size;
#if defined(PDDM_CUDA)
    if (call_.has_device()) {
      const cuda::Number type = number(into.scalar_type()).value_or(cuda::Number::int64);
      return add(from, to, type, type);
    }
#endif
    if (from.numel()) std::memcpy(to, from.const_data_ptr(), size_t(from.numel() * size));
  }
  void run() {
#if defined(PDDM_CUDA)
    if (!pending_.empty()) call_.device().convert(pending_.data(), int(pending_.size()));
    pending_.clear(), kept_.clear();
#endif
  }

 private:
  [[maybe_unused]] const Call& call_;
#if defined(PDDM_CUDA)
  static std::optional<cuda::Number> number(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Double: return cuda::Number::float64;
      case ScalarType::Float: return cuda::Number::float32;
      case ScalarType::BFloat16: return cuda::Number::bfloat16;
      case ScalarType::Half: return cuda::Number::float16;
      default: return std::nullopt;
    }
  }
  void add(const Tensor& t, void* to, cuda::Number from_type, cuda::Number to_type) {
    pending_.push_back({t.const_data_ptr(), to, t.numel(), from_type, to_type});
    kept_.push_back(t);
  }
  std::vector<cuda::Conversion> pending_;
  std::vector<Tensor> kept_;  // what pending ones read
#endif
};

// The eight parameters, dense and in the arrays' type, kept alive with the pointers into them. Runs the conversions.
class UnitTensors {
 public:
  UnitTensors(const Tensor& rows, Conversions& conversions, const Tensor& w_u, const Tensor& b_u, const Tensor& w_v,
              const Tensor& b_v, const Tensor& w_c, const Tensor& b_c, const Tensor& w_s, const Tensor& b_s,
              bool normalize_input)
      : given_{w_u, b_u, w_v, b_v, w_c, b_c, w_s, b_s} {
    STD_TORCH_CHECK(w_u.dim() == 2 && w_c.dim() == 2, "pddm: the unit's weights must be matrices");
    const int64_t hidden = w_u.size(0), combined = w_c.size(0), dim = rows.size(1);
    const int64_t expected[8] = {hidden * dim,          hidden,   hidden * dim, hidden,
                                 combined * 2 * hidden, combined, combined,     1};
    STD_TORCH_CHECK(w_u.size(1) == dim && hidden > 0 && combined > 0 && dim > 0,
                    "pddm: the unit scores features of dimension ", w_u.size(1), ", not ", dim);
    for (int k = 0; k < 8; ++k) {
      STD_TORCH_CHECK(given_[k].numel() == expected[k] && same_device(given_[k], rows), "pddm: parameter ", k,
                      " of the unit has the wrong size or device");
      dense_[k] = conversions.dense(given_[k], rows.scalar_type());
    }
    conversions.run();
    unit = {dim, hidden, combined, normalize_input, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
  }

  Unit unit;

  // Gradients in the arrays' type, to be filled; `gradient` gives them the parameters' own.
  UnitGradient make_gradient() {
    for (int k = 0; k < 8; ++k) gradient_[k] = empty(dense_[k], dense_[k].sizes());
    void* to[8];
    for (int k = 0; k < 8; ++k) to[k] = gradient_[k]->mutable_data_ptr();
    return {to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7]};
  }
  Tensor gradient(int k, Conversions& conversions) const {
    return conversions.dense(*gradient_[k], given_[k].scalar_type());
  }

 private:
  const void* at(int k) const { return dense_[k].const_data_ptr(); }

  Tensor given_[8], dense_[8];
  std::optional<Tensor> gradient_[8];
};

// Another device's indices are checked by its kernels, as torch's own indexing does.
Pairs checked_pairs(const Call& call, const Tensor& i, const Tensor& j, int64_t n, bool skip_negative) {
  STD_TORCH_CHECK(i.numel() == j.numel() && call.owns(i) && call.owns(j),
                  "pddm: i and j must be of one length, on the features' device");
  const Pairs pairs{static_cast<const int64_t*>(i.const_data_ptr()), static_cast<const int64_t*>(j.const_data_ptr()),
                    i.numel()};
  for (int64_t t = 0; call.on_host && t < pairs.count; ++t) {
    const int64_t lowest = skip_negative ? -1 : 0;
    STD_TORCH_CHECK(pairs.i[t] >= lowest && pairs.i[t] < n && pairs.j[t] >= lowest && pairs.j[t] < n, "pddm: pair ", t,
                    " is (", pairs.i[t], ", ", pairs.j[t], "), out of range for ", n, " rows");
  }
  return pairs;
}

#define PDDM_UNIT                                                                                                   \
  const Tensor &w_u, const Tensor &b_u, const Tensor &w_v, const Tensor &b_v, const Tensor &w_c, const Tensor &b_c, \
      const Tensor &w_s, const Tensor &b_s, bool normalize_input, bool allow_tf32
#define PDDM_UNIT_ARGUMENTS w_u, b_u, w_v, b_v, w_c, b_c, w_s, b_s, normalize_input

using Mined = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Mined mine(const Tensor& feats, const Tensor& labels, PDDM_UNIT, int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "pddm: unknown mode ", mode);
  Call call(feats, allow_tf32);
  Conversions conversions(call);
  const Tensor rows = conversions.dense(feats, call.dtype), y = dense(labels, ScalarType::Long);
  const int64_t n = rows.size(0);
  STD_TORCH_CHECK(y.numel() == n && same_device(rows, y), "pddm: one label per row, on its device");
  const UnitTensors tensors(rows, conversions, PDDM_UNIT_ARGUMENTS);
  const auto* label = static_cast<const int64_t*>(y.const_data_ptr());
  const Mode wanted = static_cast<Mode>(mode);
  const int64_t slots = wanted == Mode::batch    ? 1
                        : wanted == Mode::anchor ? n
                                                 : call.backend->count_positive_pairs(label, n);

  const auto indices = [&] { return empty(rows, {slots}, ScalarType::Long); };
  const auto scores = [&] { return empty(rows, {slots}, call.dtype); };
  Tensor i = indices(), j = indices(), k = indices(), l = indices(), s_ij = scores(), s_ik = scores(), s_jl = scores();
  Tensor valid = empty(rows, {slots}, ScalarType::Bool);
  const auto index = [](const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  call.backend->mine(Call::rows(rows), label, tensors.unit, wanted,
                     {slots, index(i), index(j), index(k), index(l), s_ij.mutable_data_ptr(), s_ik.mutable_data_ptr(),
                      s_jl.mutable_data_ptr(), static_cast<bool*>(valid.mutable_data_ptr())});
  return {s_ij, s_ik, s_jl, i, j, k, l, valid};
}

Tensor score_pairs(const Tensor& feats, const Tensor& i, const Tensor& j, PDDM_UNIT) {
  Call call(feats, allow_tf32);
  Conversions conversions(call);
  const Tensor rows = conversions.dense(feats, call.dtype);
  const Tensor a = dense(i, ScalarType::Long), b = dense(j, ScalarType::Long);
  const UnitTensors tensors(rows, conversions, PDDM_UNIT_ARGUMENTS);
  const Pairs pairs = checked_pairs(call, a, b, rows.size(0), false);
  Tensor scores = empty(rows, {pairs.count}, call.dtype);
  call.backend->score_pairs(Call::rows(rows), pairs, tensors.unit, scores.mutable_data_ptr());
  return scores;
}

// split < 0: all rows against all rows. Otherwise rows[:split] against rows[split:].
Tensor score_matrix(const Tensor& feats, int64_t split, PDDM_UNIT) {
  Call call(feats, allow_tf32);
  Conversions conversions(call);
  const Tensor rows = conversions.dense(feats, call.dtype);
  const UnitTensors tensors(rows, conversions, PDDM_UNIT_ARGUMENTS);
  const int64_t n = rows.size(0);
  STD_TORCH_CHECK(split <= n, "pddm: split is ", split, " of ", n, " rows");
  Tensor scores = empty(rows, {split < 0 ? n : split, split < 0 ? n : n - split}, call.dtype);
  call.backend->score_matrix(Call::rows(rows), split, tensors.unit, scores.mutable_data_ptr());
  return scores;
}

std::tuple<Tensor, Tensor> topk(const Tensor& queries, const Tensor& gallery, int64_t k, PDDM_UNIT) {
  Call call(queries, allow_tf32);
  Conversions conversions(call);
  const Tensor q = conversions.dense(queries, call.dtype), g = conversions.dense(gallery, call.dtype);
  STD_TORCH_CHECK(g.dim() == 2 && g.size(1) == q.size(1) && same_device(g, q),
                  "pddm: queries and gallery differ in dimension or device");
  STD_TORCH_CHECK(k >= 0 && k <= g.size(0), "pddm: k is ", k, " and the gallery has ", g.size(0), " rows");
  const UnitTensors tensors(q, conversions, PDDM_UNIT_ARGUMENTS);
  Tensor scores = empty(q, {q.size(0), k}, call.dtype);
  Tensor indices = empty(q, {q.size(0), k}, ScalarType::Long);
  call.backend->topk(Call::rows(q), Call::rows(g), k, tensors.unit, scores.mutable_data_ptr(),
                     static_cast<int64_t*>(indices.mutable_data_ptr()));
  return {scores, indices};
}

ScalarType real_dtype(const Tensor& given, const char* what) {
  const ScalarType dtype = given.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "pddm: ", what,
                  " must be float32 or float64");
  return dtype;
}

#if defined(PDDM_CUDA)
cuda::Classes classes_of(const Tensor& t) {
  const int64_t n = t.numel() / 4;
  int* const from = static_cast<int*>(t.mutable_data_ptr());
  return {from, from + n, from + 2 * n, from + 3 * n};
}
#endif

// Of each row of products with others the columns of other classes with the largest. `own` has the rows' classes.
Tensor largest(const Tensor& values, const Tensor& own, const Tensor& classes, int64_t count) {
  const ScalarType dtype = real_dtype(values, "values");
  const Call call(values, precision_of(values, false));
  const Tensor given = dense(values, dtype), rows = dense(own, ScalarType::Long);
  const Tensor columns = dense(classes, ScalarType::Long);
  STD_TORCH_CHECK(given.dim() == 2, "pddm: values must be a matrix");
  STD_TORCH_CHECK(rows.numel() == given.size(0) && columns.numel() == given.size(1) && same_device(given, rows) &&
                      same_device(given, columns),
                  "pddm: one class per row and per column, on their device");
  STD_TORCH_CHECK(count > 0, "pddm: count is ", count);
  const auto data = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  Tensor found = empty(given, {given.size(0), count}, ScalarType::Long);
  call.backend->largest(given.const_data_ptr(), given.size(0), given.size(1), data(rows), data(columns), count,
                        static_cast<int64_t*>(found.mutable_data_ptr()));
  return found;
}

// Each pair that lists of rows name once, and for each entry of the lists which of the pairs it is.
std::tuple<Tensor, Tensor, Tensor> asked_pairs(const Tensor& lists) {
  const Tensor given = dense(lists, ScalarType::Long);
  STD_TORCH_CHECK(given.dim() == 2, "pddm: lists must be a matrix");
  const Call call(given, Precision::float32);
  const Asked asked{static_cast<const int64_t*>(given.const_data_ptr()), given.size(0), given.size(1), given.size(1)};
  Tensor begins = empty(given, {asked.rows + 1}), places = empty(given, given.sizes());
  auto* const begin = static_cast<int64_t*>(begins.mutable_data_ptr());
  const auto data = [](const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  const int64_t count = call.backend->count_asked(asked, begin, data(places));
  Tensor i = empty(given, {count}), j = empty(given, {count});
  call.backend->write_asked(asked, begin, data(i), data(j), data(places));
  return {i, j, places};
}

std::tuple<Tensor, Tensor, Tensor> best_asked(const Tensor& scores, const Tensor& places, const Tensor& lists,
                                              bool lowest) {
  const ScalarType dtype = real_dtype(scores, "scores");
  const Tensor given = dense(lists, ScalarType::Long), at = dense(places, ScalarType::Long);
  STD_TORCH_CHECK(given.dim() == 2 && at.dim() == 2 && at.size(0) == given.size(0) && at.size(1) == given.size(1) &&
                      same_device(given, scores) && same_device(at, scores),
                  "pddm: one place per entry of the lists, on the scores' device");
  const Tensor values = dense(scores, dtype);
  const int64_t n = given.size(0);
  Tensor columns = empty(given, {n}), best = empty(values, {n}), found = empty(given, {n}, ScalarType::Bool);
  const Call call(values, precision_of(values, false));
  call.backend->best_asked({static_cast<const int64_t*>(given.const_data_ptr()), n, given.size(1), given.size(1)},
                           false, static_cast<const int64_t*>(at.const_data_ptr()), values.const_data_ptr(),
                           values.numel(), lowest,
                           {static_cast<int64_t*>(columns.mutable_data_ptr()), best.mutable_data_ptr(),
                            static_cast<bool*>(found.mutable_data_ptr())});
  return {columns, best, found};
}

// Every row with the best of its lists: of negatives, and from column `split` on of positives. Each pair is scored
// once, though both of its rows may name it.
Mined mine_listed(const Tensor& feats, const Tensor& lists, int64_t split, PDDM_UNIT) {
  Call call(feats, allow_tf32);
  Conversions conversions(call);
  const Tensor rows = conversions.dense(feats, call.dtype), given = dense(lists, ScalarType::Long);
  const int64_t n = rows.size(0);
  STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == n && same_device(rows, given),
                  "pddm: lists of each row, on its device");
  STD_TORCH_CHECK(split >= 0 && split <= given.size(1), "pddm: split is ", split, " of ", given.size(1), " columns");
  const UnitTensors tensors(rows, conversions, PDDM_UNIT_ARGUMENTS);
  const Asked asked{static_cast<const int64_t*>(given.const_data_ptr()), n, given.size(1), split};
  const auto integers = [&](int64_t count) { return empty(given, {count}); };
  const auto scores = [&](int64_t count) { return empty(rows, {count}, call.dtype); };
  const auto index = [](const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  Tensor begins = integers(n + 1), places = integers(given.numel());
  const int64_t count = call.backend->count_asked(asked, index(begins), index(places));
  Tensor first = integers(count), second = integers(count), scored = scores(count);
  call.backend->write_asked(asked, index(begins), index(first), index(second), index(places));
  call.backend->score_pairs(Call::rows(rows), {index(first), index(second), count}, tensors.unit,
                            scored.mutable_data_ptr());

  struct Found {
    Tensor rows, scores, found;
    BestAsked best;
    Found(const Tensor& of, const Tensor& score, const Tensor& is)
        : rows(of),
          scores(score),
          found(is),
          best{static_cast<int64_t*>(rows.mutable_data_ptr()), scores.mutable_data_ptr(),
               static_cast<bool*>(found.mutable_data_ptr())} {}
  };
  const auto truths = [&] { return empty(given, {n}, ScalarType::Bool); };
  const Found negative{integers(n), scores(n), truths()}, positive{integers(n), scores(n), truths()};
  const auto find = [&](bool second_half, const Found& to) {
    call.backend->best_asked(asked, second_half, index(places), scored.const_data_ptr(), count, second_half, to.best);
  };
  find(false, negative), find(true, positive);
  Tensor i = integers(n), j = integers(n), k = integers(n), l = integers(n), valid = truths();
  Tensor s_ij = scores(n), s_ik = scores(n), s_jl = scores(n);
  call.backend->join_best(n, positive.best, negative.best,
                          {n, index(i), index(j), index(k), index(l), s_ij.mutable_data_ptr(), s_ik.mutable_data_ptr(),
                           s_jl.mutable_data_ptr(), static_cast<bool*>(valid.mutable_data_ptr())});
  return {s_ij, s_ik, s_jl, i, j, k, l, valid};
}

#if defined(PDDM_CUDA)
// A device's alone: rows to multiply, what to multiply products with besides, and the rows' classes, (4, n).
std::tuple<Tensor, Tensor, Tensor> candidate_rows(const Tensor& feats, const Tensor& labels) {
  const Call call(feats, precision_of(feats, false));
  const Tensor rows = dense(feats, call.dtype), y = dense(labels, ScalarType::Long);
  STD_TORCH_CHECK(rows.dim() == 2 && y.numel() == rows.size(0) && same_device(rows, y),
                  "pddm: one label per row, on its device");
  const int64_t n = rows.size(0);
  STD_TORCH_CHECK(n <= std::numeric_limits<int>::max(), "pddm: more than 2^31 rows");
  Tensor to = empty(rows, rows.sizes(), feats.scalar_type()), weights = empty(rows, {n});
  Tensor classes = empty(rows, {4, n}, ScalarType::Int);
  call.device().candidate_rows(Call::rows(rows), rows.size(1), static_cast<const int64_t*>(y.const_data_ptr()),
                               to.mutable_data_ptr(), weights.mutable_data_ptr(), classes_of(classes));
  return {to, weights, classes};
}

Tensor candidates(const Tensor& products, int64_t first, const Tensor& weights, const Tensor& classes, int64_t count) {
  const ScalarType dtype = real_dtype(products, "products");
  const Call call(products, precision_of(products, false));
  const Tensor given = dense(products, dtype), factors = dense(weights, dtype), of = dense(classes, ScalarType::Int);
  STD_TORCH_CHECK(given.dim() == 2, "pddm: products must be a matrix");
  const int64_t rows = given.size(0), n = given.size(1);
  STD_TORCH_CHECK(first >= 0 && first <= n - rows && factors.numel() == n && of.numel() == 4 * n &&
                      same_device(given, factors) && same_device(given, of),
                  "pddm: products of rows ", first, " and following, with a weight and a class for each column");
  STD_TORCH_CHECK(count > 0, "pddm: count is ", count);
  Tensor lists = empty(given, {rows, 2 * count}, ScalarType::Long);
  call.device().candidates(given.const_data_ptr(), rows, n, first, factors.const_data_ptr(), classes_of(of), count,
                           static_cast<int64_t*>(lists.mutable_data_ptr()));
  return lists;
}
#endif

// The CPU's alone: other devices have torch's own products.
Tensor dot_products(const Tensor& x, const Tensor& y) {
  const ScalarType dtype = real_dtype(x, "x");
  const Tensor a = dense(x, dtype), b = dense(y, dtype);
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) > 0 && a.size(1) == b.size(1) && same_device(a, b),
                  "pddm: x and y must be matrices of one width, on one device");
  Tensor products = empty(a, {a.size(0), b.size(0)}, dtype);
  const Parallel parallel = torch_threads();
  cpu::dot_products(precision_of(a, false), parallel, {a.const_data_ptr(), a.size(0)}, {b.const_data_ptr(), b.size(0)},
                    a.size(1), products.mutable_data_ptr());
  return products;
}

// The CPU's alone, too. A row of a negative class takes no part.
Tensor nearest(const Tensor& rows, const Tensor& classes, int64_t count) {
  const ScalarType dtype = real_dtype(rows, "rows");
  const Tensor given = dense(rows, dtype), numbers = dense(classes, ScalarType::Long);
  STD_TORCH_CHECK(given.dim() == 2 && given.size(1) > 0, "pddm: rows must be a matrix");
  const int64_t n = given.size(0), most = int64_t(1) << 24;  // numbers that float32 holds
  STD_TORCH_CHECK(numbers.numel() == n && same_device(given, numbers), "pddm: one class per row, on its device");
  const auto* number = static_cast<const int64_t*>(numbers.const_data_ptr());
  STD_TORCH_CHECK(n <= most && (n == 0 || *std::max_element(number, number + n) < most),
                  "pddm: rows and classes are numbered up to ", most);
  STD_TORCH_CHECK(count > 0, "pddm: count is ", count);
  Tensor found = empty(given, {n, count}, ScalarType::Long);
  const Parallel parallel = torch_threads();
  cpu::nearest(precision_of(given, false), parallel, {given.const_data_ptr(), n}, given.size(1), number, count,
               static_cast<int64_t*>(found.mutable_data_ptr()));
  return found;
}

// Gradients of the rows and of the eight parameters, each in its own dtype.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Once its conversions have run, `listed` has what is scored, and makes the gradients of it.
template <class Listed>
Gradients backward(const Tensor& feats, PDDM_UNIT, const Listed& listed) {
  std::optional<Call> call(std::in_place, feats, allow_tf32);
  Conversions in(*call);
  std::optional<Tensor> rows = in.dense(feats, call->dtype);
  std::optional<decltype(listed(*call, in))> run(listed(*call, in));
  UnitTensors tensors(*rows, in, PDDM_UNIT_ARGUMENTS);
  Tensor d_rows = empty(*rows, rows->sizes());
  const UnitGradient gradient = tensors.make_gradient();
  // The CPU's backward pass touches only the rows it must.
  if (call->on_host) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(d_rows.get()));
  (*run)(Call::rows(*rows), tensors.unit, d_rows.mutable_data_ptr(), gradient);
  // What they took is free for what follows.
  run.reset(), rows.reset(), call.reset();
  const Call last(feats, allow_tf32);
  Conversions out(last);
  const auto of = [&](int k) { return tensors.gradient(k, out); };
  const Gradients gradients{
      out.dense(d_rows, feats.scalar_type()), of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)};
  out.run();
  return gradients;
}

// Of weights of pairs.
auto listed_pairs(const Call& call, const Tensor& weight, const Tensor& i, const Tensor& j) {
  return [&call, weight, i, j](const Rows& rows, const Unit& unit, void* d_rows, const UnitGradient& gradient) {
    const Pairs pairs = checked_pairs(call, i, j, rows.count, true);
    STD_TORCH_CHECK(weight.numel() == pairs.count && call.owns(weight), "pddm: one weight per pair, on its device");
    call.backend->score_pairs_backward(rows, pairs, weight.const_data_ptr(), unit, d_rows, gradient);
  };
}

Gradients score_pairs_backward(const Tensor& weight, const Tensor& feats, const Tensor& i, const Tensor& j, PDDM_UNIT) {
  return backward(feats, PDDM_UNIT_ARGUMENTS, allow_tf32, [&](const Call& call, Conversions& in) {
    return listed_pairs(call, in.dense(weight, call.dtype), dense(i, ScalarType::Long), dense(j, ScalarType::Long));
  });
}

// Of mined quadruplets' scores, of which some have a gradient; the other slots have negative indices.
Gradients mine_backward(std::optional<Tensor> g_ij, std::optional<Tensor> g_ik, std::optional<Tensor> g_jl,
                        const Tensor& feats, const Tensor& i, const Tensor& j, const Tensor& k, const Tensor& l,
                        PDDM_UNIT) {
  struct Part {
    const std::optional<Tensor>& weight;
    const Tensor &first, &second;
  };
  const Part parts[] = {{g_ij, i, j}, {g_ik, i, k}, {g_jl, j, l}};
  const int64_t slots = i.numel();
  int64_t count = 0;
  for (const Part& part : parts) {
    if (!part.weight) continue;
    count += slots;
    STD_TORCH_CHECK(part.weight->numel() == slots && part.first.numel() == slots && part.second.numel() == slots &&
                        same_device(*part.weight, feats) && same_device(part.first, feats) &&
                        same_device(part.second, feats),
                    "pddm: the fields of quadruplets must be of one length, on the features' device");
  }
  return backward(feats, PDDM_UNIT_ARGUMENTS, allow_tf32, [&](const Call& call, Conversions& in) {
    Tensor weight = empty(feats, {count}, call.dtype), first = empty(feats, {count}, ScalarType::Long),
           second = empty(feats, {count}, ScalarType::Long);
    int64_t at = 0;
    for (const Part& part : parts) {
      if (!part.weight) continue;
      in.copy(*part.weight, weight, at), in.copy(part.first, first, at), in.copy(part.second, second, at);
      at += slots;
    }
    return listed_pairs(call, weight, first, second);
  });
}

Gradients score_matrix_backward(const Tensor& weight, const Tensor& feats, int64_t split, PDDM_UNIT) {
  return backward(feats, PDDM_UNIT_ARGUMENTS, allow_tf32, [&](const Call& call, Conversions& in) {
    return [&call, split, upstream = in.dense(weight, call.dtype)](const Rows& rows, const Unit& unit, void* d_rows,
                                                                   const UnitGradient& gradient) {
      const int64_t n = rows.count;
      STD_TORCH_CHECK(
          split <= n && upstream.numel() == (split < 0 ? n * n : split * (n - split)) && call.owns(upstream),
          "pddm: one weight per score, on its device");
      call.backend->score_matrix_backward(rows, split, upstream.const_data_ptr(), unit, d_rows, gradient);
    };
  });
}

// Mined quadruplets, in whose scores' dtype their loss is computed. What keeps the pointers of `picked` alive.
struct PickedTensors {
  Call call;
  Tensor rows, i, j, k, l, s_ij, s_ik, s_jl, valid;
  Picked picked;

  PickedTensors(const Tensor& feats, const Tensor& s_ij, const Tensor& s_ik, const Tensor& s_jl, const Tensor& i,
                const Tensor& j, const Tensor& k, const Tensor& l, const Tensor& valid)
      : call(s_ij, scored(s_ij)),
        rows(converted(feats, call)),
        i(dense(i, ScalarType::Long)),
        j(dense(j, ScalarType::Long)),
        k(dense(k, ScalarType::Long)),
        l(dense(l, ScalarType::Long)),
        s_ij(dense(s_ij, rows.scalar_type())),
        s_ik(dense(s_ik, rows.scalar_type())),
        s_jl(dense(s_jl, rows.scalar_type())),
        valid(dense(valid, ScalarType::Bool)) {
    STD_TORCH_CHECK(rows.dim() == 2, "pddm: features must be a matrix");
    const int64_t slots = valid.numel(), n = rows.size(0);
    for (const Tensor* t : {&this->i, &this->j, &this->k, &this->l, &this->s_ij, &this->s_ik, &this->s_jl})
      STD_TORCH_CHECK(t->numel() == slots && same_device(*t, rows),
                      "pddm: the fields of quadruplets must be of one length, on the features' device");
    STD_TORCH_CHECK(same_device(this->valid, rows), "pddm: the fields of quadruplets must be on the features' device");
    const auto index = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
    picked = {slots,
              index(this->i),
              index(this->j),
              index(this->k),
              index(this->l),
              this->s_ij.const_data_ptr(),
              this->s_ik.const_data_ptr(),
              this->s_jl.const_data_ptr(),
              static_cast<const bool*>(this->valid.const_data_ptr())};
    // Another device's are checked by its kernels, as torch's own indexing does.
    for (int64_t q = 0; call.on_host && q < slots; ++q)
      for (const int64_t* row : {picked.i, picked.j, picked.k, picked.l})
        STD_TORCH_CHECK(!picked.valid[q] || (row[q] >= 0 && row[q] < n), "pddm: quadruplet ", q, " has row ", row[q],
                        ", out of range for ", n, " rows");
  }

 private:
  static Precision scored(const Tensor& scores) {
    real_dtype(scores, "scores");
    return precision_of(scores, false);
  }
  static Tensor converted(const Tensor& t, const Call& call) {
    Conversions conversions(call);
    Tensor made = conversions.dense(t, call.dtype);
    conversions.run();
    return made;
  }
};

#define PDDM_PICKED                                                                                                  \
  const Tensor &feats, const Tensor &s_ij, const Tensor &s_ik, const Tensor &s_jl, const Tensor &i, const Tensor &j, \
      const Tensor &k, const Tensor &l, const Tensor &valid

std::tuple<Tensor, Tensor> quadruplet_loss(PDDM_PICKED, double alpha, double beta, double weight) {
  const PickedTensors given(feats, s_ij, s_ik, s_jl, i, j, k, l, valid);
  Tensor loss = empty(given.rows, {});
  Tensor open = empty(given.rows, {given.picked.slots}, ScalarType::Byte);
  given.call.backend->quadruplet_loss(Call::rows(given.rows), given.rows.size(1), given.picked, {alpha, beta, weight},
                                      loss.mutable_data_ptr(), static_cast<uint8_t*>(open.mutable_data_ptr()));
  return {loss, open};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quadruplet_loss_backward(const Tensor& upstream, const Tensor& open,
                                                                    PDDM_PICKED, double weight) {
  const PickedTensors given(feats, s_ij, s_ik, s_jl, i, j, k, l, valid);
  const Tensor factor = dense(upstream, given.rows.scalar_type()), hinges = dense(open, ScalarType::Byte);
  STD_TORCH_CHECK(factor.numel() == 1 && hinges.numel() == given.picked.slots && same_device(factor, given.rows) &&
                      same_device(hinges, given.rows),
                  "pddm: one loss, one byte for each slot, on the features' device");
  Tensor d_rows = empty(given.rows, given.rows.sizes());
  const auto scores = [&] { return empty(given.rows, {given.picked.slots}); };
  Tensor d_ij = scores(), d_ik = scores(), d_jl = scores();
  given.call.backend->quadruplet_loss_backward(
      Call::rows(given.rows), given.rows.size(1), given.picked, weight, factor.const_data_ptr(),
      static_cast<const uint8_t*>(hinges.const_data_ptr()), d_rows.mutable_data_ptr(), d_ij.mutable_data_ptr(),
      d_ik.mutable_data_ptr(), d_jl.mutable_data_ptr());
  Conversions out(given.call);
  d_rows = out.dense(d_rows, feats.scalar_type());
  out.run();
  return {d_rows, d_ij, d_ik, d_jl};
}

}  // namespace
}  // namespace pddm

// In every schema the unit is its eight parameters as nn.Linear holds them.
#define PDDM_UNIT_SCHEMA                                                                                  \
  "Tensor w_u, Tensor b_u, Tensor w_v, Tensor b_v, Tensor w_c, Tensor b_c, Tensor w_s, Tensor b_s, bool " \
  "normalize_input, bool allow_tf32"
#define PDDM_PICKED_SCHEMA \
  "Tensor feats, Tensor s_ij, Tensor s_ik, Tensor s_jl, Tensor i, Tensor j, Tensor k, Tensor l, Tensor valid, "
#define PDDM_GRADIENTS_SCHEMA "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

STABLE_TORCH_LIBRARY(pddm, m) {
  m.def("mine(Tensor feats, Tensor labels, " PDDM_UNIT_SCHEMA
        ", int mode) -> (Tensor s_ij, Tensor s_ik, Tensor s_jl, Tensor i, Tensor j, Tensor k, Tensor l, Tensor valid)");
  m.def("score_pairs(Tensor feats, Tensor i, Tensor j, " PDDM_UNIT_SCHEMA ") -> Tensor");
  m.def("score_matrix(Tensor feats, SymInt split, " PDDM_UNIT_SCHEMA ") -> Tensor");
  m.def("topk(Tensor queries, Tensor gallery, SymInt k, " PDDM_UNIT_SCHEMA ") -> (Tensor scores, Tensor indices)");
  m.def("largest(Tensor values, Tensor own, Tensor classes, SymInt count) -> Tensor");
  m.def("asked_pairs(Tensor lists) -> (Tensor i, Tensor j, Tensor places)");
  m.def("best_asked(Tensor scores, Tensor places, Tensor lists, bool lowest) -> (Tensor, Tensor, Tensor)");
  m.def("mine_listed(Tensor feats, Tensor lists, SymInt split, " PDDM_UNIT_SCHEMA
        ") -> (Tensor s_ij, Tensor s_ik, Tensor s_jl, Tensor i, Tensor j, Tensor k, Tensor l, Tensor valid)");
  m.def("nearest(Tensor rows, Tensor classes, SymInt count) -> Tensor");
  m.def("dot_products(Tensor x, Tensor y) -> Tensor");
  m.def("candidate_rows(Tensor feats, Tensor labels) -> (Tensor rows, Tensor weights, Tensor classes)");
  m.def("candidates(Tensor products, SymInt first, Tensor weights, Tensor classes, SymInt count) -> Tensor");
  m.def("score_pairs_backward(Tensor weight, Tensor feats, Tensor i, Tensor j, " PDDM_UNIT_SCHEMA
        ") -> " PDDM_GRADIENTS_SCHEMA);
  m.def(
      "mine_backward(Tensor? g_ij, Tensor? g_ik, Tensor? g_jl, Tensor feats, Tensor i, Tensor j, Tensor k, Tensor "
      "l, " PDDM_UNIT_SCHEMA ") -> " PDDM_GRADIENTS_SCHEMA);
  m.def("score_matrix_backward(Tensor weight, Tensor feats, SymInt split, " PDDM_UNIT_SCHEMA
        ") -> " PDDM_GRADIENTS_SCHEMA);
  m.def("quadruplet_loss(" PDDM_PICKED_SCHEMA "float alpha, float beta, float weight) -> (Tensor loss, Tensor open)");
  m.def("quadruplet_loss_backward(Tensor upstream, Tensor open, " PDDM_PICKED_SCHEMA
        "float weight) -> (Tensor, Tensor, Tensor, Tensor)");
}

#define PDDM_KERNELS(m)                                                     \
  m.impl("mine", TORCH_BOX(&pddm::mine));                                   \
  m.impl("score_pairs", TORCH_BOX(&pddm::score_pairs));                     \
  m.impl("score_matrix", TORCH_BOX(&pddm::score_matrix));                   \
  m.impl("topk", TORCH_BOX(&pddm::topk));                                   \
  m.impl("largest", TORCH_BOX(&pddm::largest));                             \
  m.impl("asked_pairs", TORCH_BOX(&pddm::asked_pairs));                     \
  m.impl("best_asked", TORCH_BOX(&pddm::best_asked));                       \
  m.impl("mine_listed", TORCH_BOX(&pddm::mine_listed));                     \
  m.impl("score_pairs_backward", TORCH_BOX(&pddm::score_pairs_backward));   \
  m.impl("mine_backward", TORCH_BOX(&pddm::mine_backward));                 \
  m.impl("score_matrix_backward", TORCH_BOX(&pddm::score_matrix_backward)); \
  m.impl("quadruplet_loss", TORCH_BOX(&pddm::quadruplet_loss));             \
  m.impl("quadruplet_loss_backward", TORCH_BOX(&pddm::quadruplet_loss_backward))

#define PDDM_DEVICE_KERNELS(m)                                \
  m.impl("candidate_rows", TORCH_BOX(&pddm::candidate_rows)); \
  m.impl("candidates", TORCH_BOX(&pddm::candidates))

STABLE_TORCH_LIBRARY_IMPL(pddm, CPU, m) {
  PDDM_KERNELS(m);
  m.impl("nearest", TORCH_BOX(&pddm::nearest));
  m.impl("dot_products", TORCH_BOX(&pddm::dot_products));
#if defined(PDDM_EMULATED)
  PDDM_DEVICE_KERNELS(m);
#endif
}
#if defined(PDDM_CUDA) && !defined(PDDM_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(pddm, CUDA, m) {
  PDDM_KERNELS(m);
  PDDM_DEVICE_KERNELS(m);
}
#endif
