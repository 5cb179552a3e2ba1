// A tile of 16-bit elements in shared memory, WIDTH elements a row, swizzled so that neither ldmatrix nor 16-byte copies
// meet a bank conflict.
//
// A row is WIDTH / 8 chunks of 16 bytes. ldmatrix reads one chunk of eight consecutive rows at once; without care their
// addresses are a pitch apart and, for most widths, fall on few banks. Chunk c of row r is stored at place
// c ^ ((r >> SHIFT) & MASK) of its row; MASK + 1 divides the chunks of a row, so the place stays in the row.
#pragma once
#include "device.cuh"

// Eight elements: what ldmatrix reads of a row, and what one lane copies.
struct alignas(16) Chunk {
  uint32_t words[4];
};

template <int WIDTH>
struct SharedTile {
  static constexpr int CHUNKS = WIDTH / 8;
  static constexpr int PITCH_BYTES = WIDTH * 2;
  // A pitch is an odd multiple of 2^k chunks. Eight chunks span all banks, so rows repeat every 8 / 2^k rows: k = 0 needs no
  // swizzle, k = 1 one bit taken from the row's bit 2, k = 2 two bits from bit 1, k >= 3 three bits from bit 0.
  static constexpr int K = CHUNKS % 8 == 0 ? 3 : CHUNKS % 4 == 0 ? 2 : CHUNKS % 2 == 0 ? 1 : 0;
  static constexpr int MASK = (1 << K) - 1;
  static constexpr int SHIFT = K == 0 ? 0 : 3 - K;
  static_assert(WIDTH % 8 == 0, "a row is whole chunks");
  static_assert(CHUNKS % (MASK + 1) == 0, "the swizzle permutes the chunks of a row among themselves");

  static constexpr int bytes(int rows) { return rows * PITCH_BYTES; }

  // Offset in bytes of a chunk from the tile's start.
  static DEVICE uint32_t offset(int row, int chunk) {
    return row * PITCH_BYTES + ((chunk ^ ((row >> SHIFT) & MASK)) << 4);
  }
};
