// Words of device code that are no instruction.
#pragma once
#include "../ptx/contract.h"

#define DEVICE __device__ __forceinline__

constexpr float NEGATIVE_INFINITY = -__builtin_huge_valf();
constexpr float LARGEST_F32 = 3.40282347e38f;
constexpr float LOG2E = 1.4426950408889634f;  // exp(x) = 2^(x · log2 e)
constexpr float LN2 = 0.6931471805599453f;    // ln x = log2 x · ln 2

DEVICE float max_of(float a, float b) { return a > b ? a : b; }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE int max_of(int a, int b) { return a > b ? a : b; }
DEVICE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
DEVICE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// The element types, as tags that carry their conversions.
struct HalfElement {
  using Tag = ptx::F16;
  static DEVICE uint32_t pack(float low, float high) { return ptx::cvt_rn_f16x2_f32(high, low); }
  static DEVICE float widen(uint16_t bits) { return ptx::cvt_f32_f16(bits); }
};
struct Bfloat16Element {
  using Tag = ptx::BF16;
  static DEVICE uint32_t pack(float low, float high) { return ptx::cvt_rn_bf16x2_f32(high, low); }
  static DEVICE float widen(uint16_t bits) { return ptx::cvt_f32_bf16(bits); }
};
