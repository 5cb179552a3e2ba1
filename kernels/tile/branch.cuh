// The factors of a branch's result: gate and region.
#pragma once
#include "../params.h"
#include "device.cuh"

DEVICE float gate_of(const BranchParams& branch, int b, int h) {
  return branch.gate == nullptr ? branch.gate_value : branch.gate[b * branch.gate_stride[0] + h * branch.gate_stride[1]];
}

// 1 where there is no region; rows past seq_q have one of 0.
DEVICE float region_of(const BranchParams& branch, const ForwardParams& p, int b, int h, int query) {
  if (query >= p.seq_q) return 0.0f;
  if (branch.region == nullptr) return 1.0f;
  return branch.region[b * branch.region_stride[0] + h * branch.region_stride[1] + query * branch.region_stride[2]];
}

// Branches that a kernel goes through.
struct BranchSet {
  uint32_t wanted;      // bit n: branch n is gone through,
  uint32_t closed_too;  // even where its gate is 0

  DEVICE bool has(int branch, float gate) const {
    return (wanted >> branch & 1) != 0 && (gate != 0.0f || (closed_too >> branch & 1) != 0);
  }

  // Of a forward: a closed gate contributes nothing, but its branch has an lse.
  static DEVICE BranchSet of(const ForwardParams& p) { return {~0u, p.lse != nullptr ? ~0u : 0u}; }
};

// A factor 2^e of a row's weights and its inverse, both exact. What is rounded to 16 bits is weighed by weight · down first and
// the f32 sum by up in the end, so that neither gates of 1e-4 nor of 3000 leave the range of f16.
struct PowerOfTwo {
  float up, down;

  // Of the same exponent as `value`, within what has an inverse; 1 for 0, infinities and NaN.
  static DEVICE PowerOfTwo of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    uint32_t exponent = bits >> 23 & 0xff;
    if (exponent == 0 || exponent >= 254) exponent = 127;
    const uint32_t up_bits = exponent << 23, down_bits = (254 - exponent) << 23;
    PowerOfTwo factor;
    __builtin_memcpy(&factor.up, &up_bits, sizeof up_bits);
    __builtin_memcpy(&factor.down, &down_bits, sizeof down_bits);
    return factor;
  }
};

// That of the largest |gate · region| of a query.
DEVICE PowerOfTwo factor_of(const ForwardParams& p, int b, int h, int query) {
  float largest = 0.0f;
  for (int n = 0; n < p.branches; n++) {
    const float weight = gate_of(p.branch[n], b, h) * region_of(p.branch[n], p, b, h, query);
    largest = max_of(weight < 0.0f ? -weight : weight, largest);
  }
  return PowerOfTwo::of(largest);
}
