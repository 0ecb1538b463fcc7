// The small vectors of CUDA, with CUDA's alignment.
#pragma once

#define PDDM_VECTOR2(name, type)          \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }
#define PDDM_VECTOR4(name, type) \
  struct alignas(16) name {      \
    type x, y, z, w;             \
  };                             \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

PDDM_VECTOR2(float2, float)
PDDM_VECTOR2(double2, double)
PDDM_VECTOR2(int2, int)
PDDM_VECTOR2(uint2, unsigned)
PDDM_VECTOR2(ulonglong2, unsigned long long)
PDDM_VECTOR4(float4, float)
PDDM_VECTOR4(int4, int)
PDDM_VECTOR4(uint4, unsigned)
#undef PDDM_VECTOR2
#undef PDDM_VECTOR4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
