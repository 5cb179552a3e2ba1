// The parameter blocks of the small kernels: one input, one output; with tensor maps of both for bulk copies.
#pragma once
#include "ptx/contract.h"

struct Buffers {
  const uint32_t* in;
  uint32_t* out;
};

struct MappedBuffers {
  ptx::TensorMap from, to;
  const uint32_t* in;
  uint32_t* out;
  uint64_t unused[6];
};
