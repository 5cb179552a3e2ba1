// f16 and bf16 on a CPU that may know neither. Without a branch, so that loops over them vectorise.
#pragma once
#include <cstdint>
#include <cstring>

// The same loops compiled twice, chosen when the program starts. Only width differs: products of halves are exact in
// f32, so a fused multiply-add gives the same bits as a product and a sum.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define SIMT_WIDE __attribute__((target_clones("avx2,fma", "default")))
#else
#define SIMT_WIDE
#endif

namespace simt {

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float f32_of_f16(uint16_t half) {
  // Exponent and mantissa moved into an f32's place are the value times 2^-112, denormals included; the product is
  // exact.
  const float magnitude = float_of_bits(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
  const uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // inf and NaN keep the largest exponent
  return float_of_bits(bits_of_float(magnitude) | infinite | uint32_t(half & 0x8000) << 16);
}

inline float f32_of_bf16(uint16_t half) { return float_of_bits(uint32_t(half) << 16); }

inline uint16_t f16_of_f32(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;  // NaN: cvt.rn.f16 gives the canonical one
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {  // below 2^-14: the f32 adder rounds it to a multiple of 2^-24
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return uint16_t(sign | (bits_of_float(shifted) - 0x3f000000));
  }
  const uint32_t odd = magnitude >> 13 & 1;  // to nearest, ties to even
  return uint16_t(sign | (magnitude + 0xfff + odd - 0x38000000) >> 13);
}

inline uint16_t bf16_of_f32(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct F16Element {
  static float widen(uint16_t bits) { return f32_of_f16(bits); }
};
struct Bf16Element {
  static float widen(uint16_t bits) { return f32_of_bf16(bits); }
};

}  // namespace simt
