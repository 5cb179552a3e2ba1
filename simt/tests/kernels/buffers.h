// The parameter block of the small kernels: one input, one output.
#pragma once
#include "ptx/contract.h"

struct Buffers {
  const uint32_t* in;
  uint32_t* out;
};
