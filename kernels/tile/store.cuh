// Results to global memory.
#pragma once
#include "../params.h"
#include "layout.cuh"
#include "shared_tile.cuh"

// One row's lse, by the first of the four lanes that share it.
DEVICE void store_lse(const ForwardParams& p, int branch, int b, int h, int query, float lse) {
  if (p.lse == nullptr || query >= p.seq_q || lane_id() % 4 != 0) return;
  p.lse[branch * p.lse_stride[0] + b * p.lse_stride[1] + h * p.lse_stride[2] + query * p.lse_stride[3]] = lse;
}

// Rows [row, row + 16) of out of one head, a warp's own.
struct OutRows {
  const ForwardParams& p;
  int b, h, row;

  // rO[16, WIDTH] f32 -> element type, the one rounding -> `staging`, 16 rows of shared memory that are the warp's alone. Adds
  // what out held before, if asked to. `Tile` says where a chunk lies.
  template <class Element, int WIDTH, class Tile>
  DEVICE void stage(const float (&rO)[WIDTH / 8][4], char* staging, bool add) const {
    const uint16_t* gOut = static_cast<const uint16_t*>(p.out) + b * p.out_stride[0] + h * p.out_stride[2];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n++) {
        float low = rO[n][2 * r], high = rO[n][2 * r + 1];
        const int column = n * 8 + fragment_column(0);
        if (add && query < p.seq_q && column < p.value_dim) {
          const uint16_t* before = gOut + query * p.out_stride[1] + column;
          low += Element::widen(before[0]);
          high += Element::widen(before[1]);
        }
        const uint32_t offset = Tile::offset(fragment_row(2 * r), n) + fragment_column(0) * 2;
        *reinterpret_cast<uint32_t*>(staging + offset) = Element::pack(low, high);
      }
    }
  }

  // The same, and on to global memory, 16 bytes a lane. Warp-collective.
  template <class Element, int WIDTH, class Tile = SharedTile<WIDTH>>
  DEVICE void store(const float (&rO)[WIDTH / 8][4], char* staging, bool add) const {
    uint16_t* gOut = static_cast<uint16_t*>(p.out) + b * p.out_stride[0] + h * p.out_stride[2];
    stage<Element, WIDTH, Tile>(rO, staging, add);
    // Written: the rows, by the lanes that hold their fragments. Read next: by other lanes of the same warp.
    ptx::bar_warp_sync();
    for (int at = lane_id(); at < 16 * Tile::CHUNKS; at += WARP) {
      const int r = at / Tile::CHUNKS, chunk = at % Tile::CHUNKS;
      if (row + r >= p.seq_q || chunk * 8 >= p.value_dim) continue;
      *reinterpret_cast<Chunk*>(gOut + (row + r) * p.out_stride[1] + chunk * 8) =
          *reinterpret_cast<const Chunk*>(staging + Tile::offset(r, chunk));
    }
  }

  // rO += what out holds, in a pass of its own, for kernels without a register to spare.
  template <class Element, int WIDTH>
  DEVICE void add_held(float (&rO)[WIDTH / 8][4]) const {
    const uint16_t* gOut = static_cast<const uint16_t*>(p.out) + b * p.out_stride[0] + h * p.out_stride[2];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      if (query >= p.seq_q) continue;
      const uint16_t* gRow = gOut + query * p.out_stride[1] + fragment_column(0);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n++) {
        if (n * 8 >= p.value_dim) continue;
        const uint32_t held = *reinterpret_cast<const uint32_t*>(gRow + n * 8);
        rO[n][2 * r] += Element::widen(uint16_t(held));
        rO[n][2 * r + 1] += Element::widen(uint16_t(held >> 16));
      }
    }
  }
};

// Where a tile of 16 rows of a gradient belongs; rows at or past `end` and columns at or past `width` do not.
struct GradientTile {
  int part, b, h;
  int row, end;
  int column, width;
};

// rO[16, COLUMNS] times a factor of each row -> f32 or the element type, the one rounding -> global memory.
template <class Element, int COLUMNS>
DEVICE void store_gradient(const GradientRows& to, const GradientTile& tile, const float (&rO)[COLUMNS / 8][4],
                           const float (&factor)[ROWS_PER_LANE]) {
  struct alignas(8) Pair {
    float low, high;
  };
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++) {
    const int row = tile.row + fragment_row(2 * r);
    if (row >= tile.end) continue;
    const int64_t offset =
        tile.part * to.stride[0] + tile.b * to.stride[1] + row * to.stride[2] + tile.h * to.stride[3];
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) {
      const int column = tile.column + n * 8 + fragment_column(0);
      const float low = rO[n][2 * r] * factor[r], high = rO[n][2 * r + 1] * factor[r];
      if (column >= tile.width) continue;
      if (to.f32 != 0) {
        *reinterpret_cast<Pair*>(static_cast<float*>(to.to) + offset + column) = {low, high};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to.to) + offset + column) = Element::pack(low, high);
      }
    }
  }
}
