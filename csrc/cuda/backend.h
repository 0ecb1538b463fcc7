// The CUDA room's door: a backend for one call, on the caller's device and stream.
#pragma once

#include <memory>

#include "../problem.h"

namespace pddm::cuda {

// What a call may use: memory is asked of the host framework, which frees it when the stream has passed.
struct Caller {
  int device;
  void* stream;  // cudaStream_t
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
  int64_t slab = 0;  // bytes to ask for at once, for what is small; 0 asks for everything by itself
};

// Rows by their classes, which are numbered by the rows before them in the order of labels and, in a class, of rows.
struct Classes {
  int *of, *begins, *sizes, *order;  // of every row its class and where that begins in the order, and its length
};

// `count` numbers in another type or, of whole ones, in their own.
enum class Number { float32, float64, bfloat16, float16, int64 };
struct Conversion {
  const void* from;
  void* to;
  int64_t count;
  Number from_type, to_type;
};
constexpr int kConversions = 18;  // at once: rows, a unit's parameters, and three lists of weights and pairs

// What this backend does besides.
class DeviceBackend : public Backend {
 public:
  virtual void convert(const Conversion* conversions, int count) const = 0;

  // For candidates(): rows in the storage of the features' precision, whose products times both `weights` are those of
  // unit rows, and their classes, −1 for a row that is not finite.
  virtual void candidate_rows(const Rows& rows, int64_t dim, const int64_t* labels, void* to, void* weights,
                              const Classes& classes) const = 0;
  // Of `rows` rows from `first` on, whose products with all n are given: up to `count` of other classes with the
  // largest, and up to as many of its own with the least; (rows, 2 count), each half in ascending order, −1 after.
  virtual void candidates(const void* products, int64_t rows, int64_t n, int64_t first, const void* weights,
                          const Classes& classes, int64_t count, int64_t* lists) const = 0;
};

// The caller has made `device` current. Throws std::runtime_error for CUDA's errors.
std::unique_ptr<const DeviceBackend> make_backend(Precision precision, const Caller& caller);

// Whether hopper.cuh scores there in this precision, where a unit's size lets it.
bool warpgroups(Precision precision, int device);

// Over all streams of the current device; waits for it. Kernel launches are the host's count.
Counters read_counters();
void reset_counters();

}  // namespace pddm::cuda
