// What CUTLASS's own headers make of an operand whose rows are 64 or 128 bytes of half precision numbers: for
// test_descriptors.cpp.
#include "cutlass.h"

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

namespace {

template <int RowBytes>
auto rows() {
  using Atom = std::conditional_t<RowBytes == 128, SM90::GMMA::Layout_K_SW128_Atom<half_t>,
                                  SM90::GMMA::Layout_K_SW64_Atom<half_t>>;
  using All = decltype(tile_to_shape(Atom{}, Shape<_256, Int<RowBytes / 2>>{}));
  return make_tensor(make_smem_ptr(static_cast<half_t*>(nullptr)), All{});
}

template <int RowBytes>
CutlassRows made() {
  const auto of = local_tile(rows<RowBytes>(), Shape<_256, _16>{}, make_coord(0, 0));
  return {SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(of),
          [](uint64_t descriptor, int step) -> uint64_t {
            const auto pieces = recast<uint128_t const>(rows<RowBytes>());
            return *(SM90::GMMA::DescriptorIterator{descriptor} + pieces.layout()(0, 2 * step));
          },
          [](int row, int k) {
            const auto all = rows<RowBytes>();
            return unsigned(reinterpret_cast<uintptr_t>(raw_pointer_cast(&all(row, k))));
          }};
}

}  // namespace

CutlassRows cutlass_rows(int row_bytes) { return row_bytes == 128 ? made<128>() : made<64>(); }

CutlassPlace cutlass_sum(int thread, int i) {
  const int place = SM90::GMMA::CLayout_64x256{}(thread, i);
  return {place % 64, place / 64};
}
CutlassPlace cutlass_left(int thread, int i) {
  const int place = SM90::GMMA::ALayout_64x16{}(thread, i);
  return {place % 64, place / 64};
}

uint64_t cutlass_descriptor(unsigned start, unsigned leading, unsigned stride, unsigned base, unsigned layout) {
  GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = uint16_t(start);
  descriptor.bitfield.leading_byte_offset_ = uint16_t(leading);
  descriptor.bitfield.stride_byte_offset_ = uint16_t(stride);
  descriptor.bitfield.base_offset_ = uint8_t(base);
  descriptor.bitfield.layout_type_ = uint8_t(layout);
  return descriptor;
}
