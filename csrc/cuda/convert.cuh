// Arrays in another type of number, several in one launch.
#pragma once

#include "launch.cuh"

namespace pddm::cuda {

constexpr int kConvertThreads = 256, kConvertEach = 4, kConvertBlock = kConvertThreads * kConvertEach;

struct ConversionList {
  Conversion of[kConversions];
  int64_t blocks[kConversions];  // up to and with each
  int count;
};

__device__ __forceinline__ double read_number(const void* from, Number type, int64_t at) {
  if (type == Number::float64) return static_cast<const double*>(from)[at];
  if (type == Number::float32) return static_cast<const float*>(from)[at];
  const uint32_t bits = static_cast<const uint16_t*>(from)[at];
  if (type == Number::bfloat16) return __uint_as_float(bits << 16);
  // Of float16 all but infinity and NaN are 2^112 times as large as with the exponent of a float.
  const uint32_t sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  const float size = __uint_as_float(rest) * __uint_as_float((127 + 112) << 23);
  const uint32_t bits_of_size = rest >= 0x7c00u << 13 ? rest | 0x7f800000 : __float_as_uint(size);
  return __uint_as_float(sign | bits_of_size);
}

__device__ __forceinline__ void write_number(void* to, Number type, int64_t at, double x) {
  const auto rounded = float(x);
  switch (type) {
    case Number::float64: static_cast<double*>(to)[at] = x; break;
    case Number::float32: static_cast<float*>(to)[at] = rounded; break;
    case Number::bfloat16: static_cast<uint16_t*>(to)[at] = uint16_t(pack(Bf16{}, rounded, 0.0f)); break;
    case Number::float16: static_cast<uint16_t*>(to)[at] = uint16_t(pack(F16{}, rounded, 0.0f)); break;
    case Number::int64: break;  // never of these
  }
}

static __global__ void __launch_bounds__(kConvertThreads) convert_kernel(const __grid_constant__ ConversionList list) {
  int which = 0;
  while (blockIdx.x >= list.blocks[which]) ++which;
  const Conversion& conversion = list.of[which];
  const int64_t first = (blockIdx.x - (which ? list.blocks[which - 1] : 0)) * kConvertBlock + threadIdx.x;
#pragma unroll
  for (int part = 0; part < kConvertEach; ++part) {
    const int64_t at = first + part * kConvertThreads;
    if (at >= conversion.count) continue;
    if (conversion.from_type == Number::int64)
      static_cast<int64_t*>(conversion.to)[at] = static_cast<const int64_t*>(conversion.from)[at];
    else
      write_number(conversion.to, conversion.to_type, at, read_number(conversion.from, conversion.from_type, at));
  }
}

inline void convert(const Context& context, const Conversion* conversions, int count) {
  if (count > kConversions) throw std::logic_error("pddm: more conversions than a launch has room for");
  ConversionList list{};
  int64_t blocks = 0;
  for (; list.count < count; ++list.count) {
    list.of[list.count] = conversions[list.count];
    list.blocks[list.count] = blocks += divided_up(conversions[list.count].count, kConvertBlock);
  }
  context.launch(convert_kernel, blocks, kConvertThreads, 0, list);
}

}  // namespace pddm::cuda
