// The two products of attention on 16 query rows of one warp.
#pragma once
#include "layout.cuh"
#include "shared_tile.cuh"

// Sixteen rows of a shared tile as the A operand: steps of 16 columns, and one of 8 where WIDTH leaves it. Kept in
// registers, or read again for every use where there are too few.
template <int WIDTH, bool IN_REGISTERS>
struct RowsA {
  using Tile = SharedTile<WIDTH>;
  static constexpr int STEPS = WIDTH / 16;
  static constexpr bool TAIL = WIDTH % 16 != 0;
  static_assert(IN_REGISTERS || !TAIL, "only wide rows are read again, and those are whole steps");

  uint32_t kept[IN_REGISTERS ? STEPS : 1][4];
  uint32_t kept_tail[2];
  uint32_t sTile;
  int row;

  // Rows [row, row + 16) of the tile at window address `sTile`. Warp-collective.
  DEVICE void load(uint32_t tile, int first_row) {
    sTile = tile;
    row = first_row;
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int k = 0; k < STEPS; k++) read(kept[k], k);
      if constexpr (TAIL) ptx::ldmatrix_x2(kept_tail, sTile + Tile::offset(row + lane_id() % 16, Tile::CHUNKS - 1));
    }
  }

  DEVICE void step(uint32_t (&rA)[4], int k) const {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < 4; i++) rA[i] = kept[k][i];
    } else {
      read(rA, k);
    }
  }

 private:
  DEVICE void read(uint32_t (&rA)[4], int k) const {
    ptx::ldmatrix_x4(rA, sTile + Tile::offset(row + lane_id() % 16, k * 2 + lane_id() / 16));
  }
};

// rS[16, KEYS] = Q[16, WIDTH] · sK[KEYS, WIDTH]ᵀ, f32. Warp-collective.
template <class Element, int KEYS, int WIDTH, bool IN_REGISTERS>
DEVICE void product_qk(float (&rS)[KEYS / 8][4], const RowsA<WIDTH, IN_REGISTERS>& q, uint32_t sK) {
  using Tile = SharedTile<WIDTH>;
  using Tag = typename Element::Tag;
  static_assert(KEYS % 16 == 0, "keys are taken 16 at a time");
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) rS[n][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++) {
    uint32_t rQ[4];
    q.step(rQ, k);
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
      // Sixteen keys as the column-major B of two m16n8: matrices 0, 1 are the two halves of the step of keys 0..7, 2, 3
      // those of keys 8..15.
      uint32_t rK[4];
      ptx::ldmatrix_x4(rK, sK + Tile::offset(n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      ptx::mma_m16n8k16(Tag(), rS[2 * n], rQ, rK[0], rK[1]);
      ptx::mma_m16n8k16(Tag(), rS[2 * n + 1], rQ, rK[2], rK[3]);
    }
  }
  if constexpr (RowsA<WIDTH, IN_REGISTERS>::TAIL) {
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
      uint32_t rK[2];
      ptx::ldmatrix_x2(rK, sK + Tile::offset(n * 16 + lane % 16, Tile::CHUNKS - 1));
      ptx::mma_m16n8k8(Tag(), rS[2 * n], q.kept_tail, rK[0]);
      ptx::mma_m16n8k8(Tag(), rS[2 * n + 1], q.kept_tail, rK[1]);
    }
  }
}

// rO[16, WIDTH] += rP[16, KEYS] · sV[KEYS, WIDTH]. The probabilities come as packed accumulators, which are an A operand
// as they lie (tile/layout.cuh). Warp-collective.
template <class Element, int WIDTH, int KEYS>
DEVICE void product_pv(float (&rO)[WIDTH / 8][4], const uint32_t (&rP)[KEYS / 8][2], uint32_t sV) {
  using Tile = SharedTile<WIDTH>;
  using Tag = typename Element::Tag;
  const int lane = lane_id();
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) {
    const uint32_t rA[4] = {rP[2 * k][0], rP[2 * k][1], rP[2 * k + 1][0], rP[2 * k + 1][1]};
    const int key = k * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < WIDTH / 16; n++) {
      uint32_t rV[4];
      ptx::ldmatrix_x4_trans(rV, sV + Tile::offset(key, n * 2 + lane / 16));
      ptx::mma_m16n8k16(Tag(), rO[2 * n], rA, rV[0], rV[1]);
      ptx::mma_m16n8k16(Tag(), rO[2 * n + 1], rA, rV[2], rV[3]);
    }
    if constexpr (WIDTH % 16 != 0) {
      uint32_t rV[2];
      ptx::ldmatrix_x2_trans(rV, sV + Tile::offset(key, Tile::CHUNKS - 1));
      ptx::mma_m16n8k16(Tag(), rO[WIDTH / 8 - 1], rA, rV[0], rV[1]);
    }
  }
}
