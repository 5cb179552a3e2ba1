// dk and dv of keys that stay in shared memory while the queries pass: P and dS of 64 queries, written by the warps
// that have them in registers, become products with dout and Q that are added to f32 sums, 16 keys by 16 columns each.
//
//   dV += up · (w Pᵀ / up) dout     dK += up · (dSᵀ / up) Q     up: a power of two per branch, taken out before rounding
//
// Segments without a gradient that is wanted have no part in it. A sum belongs to one warp, and each of its numbers to one
// lane, from the beginning to the end.
#pragma once
#include "../params.h"
#include "branch.cuh"
#include "product.cuh"
#include "store.cuh"

template <class Element, int WIDTH, int WARPS>
struct ResidentGradients {
  using Tile = SharedTile<WIDTH>;
  using KeyColumns = SharedTile<16>;  // P or dS of the queries and 16 keys
  static constexpr int BLOCK_Q = WARPS * 16;
  static constexpr int COLUMNS_BYTES = KeyColumns::bytes(BLOCK_Q);
  static constexpr int COLUMN_TILES = (WIDTH + 15) / 16;
  static constexpr int SUM_FLOATS = 8 * WARP;  // one for each accumulator register and lane
  static constexpr int UP_BYTES = MAX_BRANCHES * 4;
  static constexpr int TILE_BYTES = 2 * (COLUMNS_BYTES + COLUMN_TILES * SUM_FLOATS * 4);
  static constexpr int bytes(int tiles) { return UP_BYTES + tiles * TILE_BYTES; }

  const BackwardParams& p;
  const ForwardParams& f;
  char* const shared;
  const uint32_t sShared;
  const int b, h, slot;
  int tiles;

  DEVICE ResidentGradients(const BackwardParams& p, char* shared, int b, int h, int slot)
      : p(p), f(p.forward), shared(shared), sShared(ptx::shared_address(shared)), b(b), h(h), slot(slot), tiles(0) {
    for (int s = 0; s < f.branch[f.branches - 1].end_segment; s++) {
      if (wanted(s)) tiles += tiles_of(s);
    }
  }

  DEVICE bool wanted(int segment) const {
    return p.segment[segment].dk.to != nullptr || p.segment[segment].dv.to != nullptr;
  }

  DEVICE void clear() const {
    for (int item = warp_id(); item < items(); item += WARPS) {
      for (int i = 0; i < 8; i++) *sum_at(item, i) = 0.0f;
    }
  }

  // What was taken out of P and dS of a branch.
  DEVICE void scale(int branch, float up) const {
    if (threadIdx.x == 0) *up_of(branch) = up;
  }

  // P and dS of the warp's queries and the 16 keys of a tile.
  DEVICE void write(int tile, const uint32_t (&rP)[2][2], const uint32_t (&rDs)[2][2]) const {
    write_columns(columns(tile), rP);
    write_columns(columns(tiles + tile), rDs);
  }

  // All that was written, times the tiles of dout and Q at these window addresses.
  DEVICE void add(uint32_t sQ, uint32_t sDout) const {
    for (int item = warp_id(); item < items(); item += WARPS) add_product(item, sQ, sDout);
  }

  DEVICE void store() const {
    for (int item = warp_id(); item < items(); item += WARPS) store_sum(item);
  }

 private:
  // A product of 16 keys by 16 columns, of dv or of dk.
  struct Item {
    int tile, column, segment, branch, kv;
    bool dk;
    const GradientRows& to;
  };

  DEVICE int tiles_of(int segment) const { return (f.segment[segment].seq_kv + 15) / 16; }
  DEVICE int items() const { return tiles * 2 * COLUMN_TILES; }

  // Shared memory: powers of two | P of each tile | dS | sums
  DEVICE float* up_of(int branch) const { return reinterpret_cast<float*>(shared) + branch; }
  DEVICE uint32_t columns(int tile) const { return UP_BYTES + tile * COLUMNS_BYTES; }
  DEVICE float* sum_at(int item, int i) const {
    return reinterpret_cast<float*>(shared + columns(2 * tiles)) + (item * 8 + i) * WARP + lane_id();
  }

  DEVICE void write_columns(uint32_t place, const uint32_t (&rColumns)[2][2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int r = 0; r < ROWS_PER_LANE; r++) {
        const uint32_t offset = KeyColumns::offset(warp_id() * 16 + fragment_row(2 * r), i) + fragment_column(0) * 2;
        *reinterpret_cast<uint32_t*>(shared + place + offset) = rColumns[i][r];
      }
    }
  }

  DEVICE Item item_at(int number) const {
    const int column = number % COLUMN_TILES * 16, rest = number / COLUMN_TILES, tile = rest / 2;
    const bool dk = rest % 2 != 0;
    int segment = 0, branch = 0, before = tile;
    for (;; segment++) {
      if (!wanted(segment)) continue;
      if (before < tiles_of(segment)) break;
      before -= tiles_of(segment);
    }
    while (segment >= f.branch[branch].end_segment) branch++;
    return {tile, column, segment, branch, before * 16, dk, dk ? p.segment[segment].dk : p.segment[segment].dv};
  }

  DEVICE void add_product(int number, uint32_t sQ, uint32_t sDout) const {
    const Item item = item_at(number);
    if (item.to.to == nullptr) return;
    const uint32_t sA = sShared + columns(item.dk ? tiles + item.tile : item.tile), sB = item.dk ? sQ : sDout;
    const int lane = lane_id();
    float rC[2][4] = {};
#pragma unroll
    for (int k = 0; k < BLOCK_Q / 16; k++) {
      // Transposed, queries become the columns of A: matrices 0, 2 are keys 0..7, 1, 3 keys 8..15.
      uint32_t rA[4];
      ptx::ldmatrix_x4_trans(rA, sA + KeyColumns::offset(k * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2));
      const int query = k * 16 + lane % 16;
      if (item.column + 16 <= WIDTH) {
        uint32_t rB[4];
        ptx::ldmatrix_x4_trans(rB, sB + Tile::offset(query, item.column / 8 + lane / 16));
        ptx::mma_m16n8k16(typename Element::Tag(), rC[0], rA, rB[0], rB[1]);
        ptx::mma_m16n8k16(typename Element::Tag(), rC[1], rA, rB[2], rB[3]);
      } else {
        uint32_t rB[2];
        ptx::ldmatrix_x2_trans(rB, sB + Tile::offset(query, Tile::CHUNKS - 1));
        ptx::mma_m16n8k16(typename Element::Tag(), rC[0], rA, rB[0], rB[1]);
      }
    }
    const float up = *up_of(item.branch);
#pragma unroll
    for (int i = 0; i < 8; i++) *sum_at(number, i) += up * rC[i / 4][i % 4];
  }

  // The part of this block: of its head of the group, and of its queries.
  DEVICE void store_sum(int number) const {
    const Item item = item_at(number);
    if (item.to.to == nullptr) return;
    const SegmentParams& s = f.segment[item.segment];
    float rC[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) rC[i / 4][i % 4] = *sum_at(number, i);
    // The gate is the same for all queries of the block.
    const float scale = gate_of(f.branch[item.branch], b, h) * (item.dk ? f.softmax_scale : 1.0f);
    const float factors[ROWS_PER_LANE] = {scale, scale};
    const int part = h % s.group * f.head_blocks + slot, width = item.dk ? f.head_dim : f.value_dim;
    store_gradient<Element, 16>(item.to, {part, b, h / s.group, item.kv, s.seq_kv, item.column, width}, rC, factors);
  }
};
