// A tile of 16-bit elements as bulk copies write and wgmma reads it: blocks of 64 columns one after the other, each of ROWS
// rows of 128 bytes, under the 128-byte swizzle. A width that is no multiple of 64 leaves the rest of the last block
// unused: bulk copies fill it with zeros, wgmma does not look at it.
//
// The swizzle permutes the eight 16-byte chunks of a row by the row's number modulo 8, by address: tiles start at multiples of
// 1024 bytes. Sources: PTX ISA, "Tensor swizzling modes", "Matrix Descriptor Format".
#pragma once
#include "device.cuh"

template <int WIDTH, int ROWS>
struct SwizzledTile {
  static constexpr int COLUMNS = 64;  // of a block
  static constexpr int PITCH_BYTES = COLUMNS * 2;
  static constexpr int BLOCKS = (WIDTH + COLUMNS - 1) / COLUMNS;
  // Of a row, with those behind WIDTH: eight lanes on one row of a block meet no bank conflict.
  static constexpr int CHUNKS = BLOCKS * 8;
  static constexpr int BLOCK_BYTES = ROWS * PITCH_BYTES;
  static constexpr int BYTES = BLOCKS * BLOCK_BYTES;
  static_assert(WIDTH % 8 == 0 && ROWS % 8 == 0, "whole chunks, whole patterns");

  // Offset in bytes of a chunk from the tile's start.
  static DEVICE uint32_t offset(int row, int chunk) {
    return chunk / 8 * BLOCK_BYTES + row * PITCH_BYTES + ((chunk % 8 ^ row % 8) << 4);
  }
};

// Where a tensor map has index i of a dimension: broadcast along it, a tensor has one index there.
DEVICE int map_index(int64_t stride, int i) { return stride == 0 ? 0 : i; }

// Descriptor of a matrix in such a tile: eight rows are 1024 bytes; K-major operands need no more. Of an MN-major one the
// next 64 columns are a block on.
struct MatrixDescriptor {
  uint32_t low;  // start, and bytes to the next block, both in units of 16
  static constexpr uint32_t HIGH = 1024 >> 4 | 1u << 30;  // bytes to the next eight rows; the 128-byte swizzle

  DEVICE MatrixDescriptor(uint32_t address, int block_bytes) : low((address >> 4 & 0x3fff) | uint32_t(block_bytes) >> 4 << 16) {}

  // That of the same matrix `bytes` on.
  DEVICE uint64_t at(int bytes) const { return uint64_t(HIGH) << 32 | (low + (uint32_t(bytes) >> 4)); }
};
