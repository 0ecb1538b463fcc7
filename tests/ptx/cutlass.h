// CUTLASS's word, for code that sees no header of CUDA's.
#pragma once

#include <cstdint>

// Of an operand at address 0: on the host it knows no other, and says so ("ERROR: cast_smem_ptr_to_uint …").
struct CutlassRows {
  uint64_t descriptor;
  uint64_t (*advanced)(uint64_t descriptor, int step);  // 16 · step inputs further on
  unsigned (*place)(int row, int k);                    // in bytes
};
CutlassRows cutlass_rows(int row_bytes);

// Row and column of a thread's sum i of 64 × 256, or of the left operand's number i of 64 × 16.
struct CutlassPlace {
  int row, column;
};
CutlassPlace cutlass_sum(int thread, int i);
CutlassPlace cutlass_left(int thread, int i);

// Of the fields of its GmmaDescriptor.
uint64_t cutlass_descriptor(unsigned start, unsigned leading, unsigned stride, unsigned base, unsigned layout);
