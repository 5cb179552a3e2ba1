// Rows of a global tensor into a shared tile, asynchronously; what lies outside becomes zero without being read.
#pragma once
#include "shared_tile.cuh"

// Rows [first, first + ROWS) of a tensor whose row r starts at base + r * row_stride, `width` elements each, into the
// tile at window address `sTile`. Rows at or past `end` and chunks at or past `width` are filled with zeros: the products run
// over whole tiles, and 0 times what an uninitialised chunk holds could be NaN.
// THREADS threads take part, `thread` from 0 on. The copies belong to the caller's next commit.
// `Tile` says where a chunk lies.
template <int WIDTH, int ROWS, int THREADS, class Tile = SharedTile<WIDTH>>
DEVICE void load_rows(uint32_t sTile, const uint16_t* gBase, int64_t row_stride, int first, int end, int width,
                      int thread) {
  constexpr int TOTAL = ROWS * Tile::CHUNKS;
#pragma unroll
  for (int step = 0; step < (TOTAL + THREADS - 1) / THREADS; step++) {
    const int at = step * THREADS + thread;
    const int row = at / Tile::CHUNKS, chunk = at % Tile::CHUNKS;
    if (TOTAL % THREADS != 0 && at >= TOTAL) break;
    const bool inside = first + row < end && chunk * 8 < width;
    // Even a copy of no bytes wants a valid address.
    const uint16_t* source = inside ? gBase + (first + row) * row_stride + chunk * 8 : gBase;
    ptx::cp_async_cg_16(sTile + Tile::offset(row, chunk), source, inside ? 16 : 0);
  }
}
