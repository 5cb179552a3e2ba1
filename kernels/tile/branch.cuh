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
