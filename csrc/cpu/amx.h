// Tile registers (AMX): sixteen rows of 64 bytes each, and one instruction for the product of two.
//
//                   b: 16 words × 16 columns
//                  ┌──────────┐       acc[r][c] += Σ_w a[r][w] · b[w][c], where a word of 32 bits holds two numbers of
//     a: 16 rows   │          │       bfloat16. The sum is float32's; what is denormal counts as zero.
//     × 16 words   └──────────┘
//    ┌──────────┐  ┌──────────┐       8,192 multiply-adds in 16 cycles, of which two units for vectors make 512 in
//    │          │─►│ acc      │       float32.
//    └──────────┘  └──────────┘
//
// A thread has no tiles until it asks for them, and gives them back: they would be saved whenever it is interrupted.
#pragma once

#include "simd.h"

namespace pddm::PDDM_ISA {

constexpr int kTileRows = 16, kTileWords = kTileRows * 16;  // of 32 bits

#if defined(PDDM_EMULATE_AMX)

namespace {

struct EmulatedTile {
  uint32_t word[kTileRows][16];
};
thread_local EmulatedTile emulated_tiles[8];
thread_local bool emulated_tiles_there = false;

template <int T>
EmulatedTile& emulated_tile() {
  if (!emulated_tiles_there) __builtin_trap();
  return emulated_tiles[T];
}

}  // namespace

PDDM_INLINE void take_tiles() { emulated_tiles_there = true; }
PDDM_INLINE void leave_tiles() { emulated_tiles_there = false; }

template <int T>
PDDM_INLINE void clear_tile() {
  std::memset(&emulated_tile<T>(), 0, sizeof(EmulatedTile));
}
template <int T>
PDDM_INLINE void load_tile(const void* from, int64_t stride = 64) {
  for (int r = 0; r < kTileRows; ++r)
    std::memcpy(emulated_tile<T>().word[r], static_cast<const char*>(from) + r * stride, 64);
}
template <int T>
PDDM_INLINE void store_tile(void* to, int64_t stride = 64) {
  for (int r = 0; r < kTileRows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, emulated_tile<T>().word[r], 64);
}
// In the order of the instruction: even and odd numbers apart, and the sum of both to what was there.
template <int Acc, int A, int B>
PDDM_INLINE void dot_bf16_tiles() {
  const auto number = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  for (int r = 0; r < kTileRows; ++r)
    for (int c = 0; c < 16; ++c) {
      float even = 0, odd = 0;
      for (int w = 0; w < 16; ++w) {
        const uint32_t a = emulated_tile<A>().word[r][w], b = emulated_tile<B>().word[w][c];
        even += number(a << 16) * number(b << 16);
        odd += number(a & 0xffff0000u) * number(b & 0xffff0000u);
      }
      uint32_t& word = emulated_tile<Acc>().word[r][c];
      const float sum = number(word) + (even + odd);
      std::memcpy(&word, &sum, sizeof sum);
    }
}

#else

PDDM_INLINE void take_tiles() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof config == 64);
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
PDDM_INLINE void leave_tiles() { __asm__ volatile("tilerelease" ::); }

template <int T>
PDDM_INLINE void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
PDDM_INLINE void load_tile(const void* from, int64_t stride = 64) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
PDDM_INLINE void store_tile(void* to, int64_t stride = 64) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int Acc, int A, int B>
PDDM_INLINE void dot_bf16_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Acc), "i"(A), "i"(B));
}

#endif

struct Tiles {
  PDDM_INLINE Tiles() { take_tiles(); }
  PDDM_INLINE ~Tiles() { leave_tiles(); }
  Tiles(const Tiles&) = delete;
};

}  // namespace pddm::PDDM_ISA
