// Matrix descriptors of wgmma with the 128-byte swizzle ("Asynchronous Warpgroup Level Matrix Instructions: matrix
// descriptor", "strides", "canonical layouts").
#pragma once
#include <cstdint>

#include "tensor_map.hpp"

namespace simt {

enum class Major { K, MN };

struct Descriptor {
  uint64_t bits;

  // Addresses and byte offsets are stored without their lower four bits.
  uint32_t field(int shift) const { return uint32_t(bits >> shift & 0x3fff) << 4; }
  uint32_t start() const { return field(0); }
  uint32_t leading() const { return field(16); }
  uint32_t stride() const { return field(32); }
  uint32_t base_offset() const { return bits >> 49 & 7; }
  bool swizzles_128() const { return bits >> 62 == 1; }
  // The swizzle goes by address: where the pattern's rows start, eight rows of 128 bytes, so must the tile.
  bool tile_aligned() const { return (start() >> 7 & 7) == 0 && base_offset() == 0; }

  // Window address of element (mn, k), k < 16. K-major: rows of 128 bytes along k, `stride` from eight rows to the
  // next. MN-major: rows of 64 elements along mn, one per k; `stride` from eight k to the next, `leading` to the next
  // 64 mn.
  uint32_t element(Major major, uint32_t mn, uint32_t k) const {
    const uint32_t linear = major == Major::K ? mn / 8 * stride() + mn % 8 * 128 + k * 2
                                              : mn / 64 * leading() + mn % 64 * 2 + k / 8 * stride() + k % 8 * 128;
    return swizzle_128(start() + linear);
  }
};

}  // namespace simt
