// The CPU backend: which instruction set runs, and the Backend of a precision on it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "memory.h"

namespace pddm::cpu {

struct Capability {
  std::string name;
  bool supported;  // by this machine; what was not compiled is not listed
};

std::vector<Capability> capabilities();  // lowest first
std::string capability();                // the one in use

// Uses a lower set from now on, or the best with an empty name. Throws std::invalid_argument.
void set_capability(const std::string& name);

// The products that a precision really runs in: bfloat16 falls back on float32 where there is no instruction for it.
Precision effective(Precision precision);

// Refers to `parallel`.
std::unique_ptr<const Backend> make_backend(Precision precision, const Parallel& parallel);

// Of every row the `count` rows of other classes with the largest dot products, in ascending order: (n, count), −1
// where there are fewer. Of equal products those of the lowest rows; a row of a negative class is nobody's, and has
// none. A product that is NaN or −∞ is nobody's, either.
void nearest(Precision precision, const Parallel& parallel, const Rows& rows, int64_t dim, const int64_t* classes,
             int64_t count, int64_t* indices);

// x · yᵀ of rows of `dim` numbers: (x.count, y.count).
void dot_products(Precision precision, const Parallel& parallel, const Rows& x, const Rows& y, int64_t dim,
                  void* products);

// Floating-point operations per second of multiply-adds on registers, on all of `parallel`'s threads at once, measured
// for about `seconds`: the ceiling of this backend in that precision.
double multiply_add_peak(Precision precision, const Parallel& parallel, double seconds);

}  // namespace pddm::cpu
