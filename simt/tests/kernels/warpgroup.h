// What the sm_90a test kernels share: parameters with a tensor map, descriptors, waiting, places of elements.
#pragma once
#include "ptx/contract.h"

constexpr uint32_t TILE = 64, ROW_BYTES = TILE * 2, TILE_BYTES = TILE * ROW_BYTES;  // 64 x 64 halves

// The phase is handed over in a loop: the hardware may give up waiting.
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Descriptor of a tile of rows of 128 bytes under the 128-byte swizzle; 1024 bytes from eight rows to the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return (address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Bytes from a tile's start to a 16-byte chunk of a row.
__device__ __forceinline__ uint32_t chunk_place(uint32_t row, uint32_t chunk) {
  return row * ROW_BYTES + (chunk ^ (row & 7)) * 16;
}
