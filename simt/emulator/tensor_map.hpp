// What a tensor map says, in the emulator's own encoding of the 128 opaque bytes.
#pragma once
#include <cstdint>

namespace simt {

enum class Swizzle : uint32_t { None = 0, Bytes128 = 128 };

// The 128-byte swizzle permutes the 16-byte chunks of each row of 128 bytes by the row's number modulo 8. It works on
// window addresses, not on offsets into the tile: that is why tiles are 1024-byte aligned.
constexpr uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct TensorLayout {
  const char* base;
  uint64_t dimensions[4];  // in elements of two bytes, innermost first
  uint64_t strides[3];     // in bytes, of dimensions 1 to 3
  uint16_t box[4];
  Swizzle swizzle;
  uint32_t magic;

  // Where the element lies that would lie at this window address without a swizzle.
  uint32_t place(uint32_t address) const { return swizzle == Swizzle::Bytes128 ? swizzle_128(address) : address; }
  uint32_t box_bytes() const { return 2u * box[0] * box[1] * box[2] * box[3]; }
};
constexpr uint32_t TENSOR_MAP_MAGIC = 0x7e450a90;

// cuTensorMapEncodeTiled for four dimensions of 16-bit elements, without interleave, element strides of 1, zero fill.
// Returns the rule that is broken, or null.
const char* encode(TensorLayout& layout, const void* base, const uint64_t (&dimensions)[4],
                   const uint64_t (&strides)[3], const uint32_t (&box)[4], uint32_t swizzle_bytes);

}  // namespace simt
