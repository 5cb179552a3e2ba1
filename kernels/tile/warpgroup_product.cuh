// The two products of attention on 64 query rows of a warpgroup. Both are only issued: the caller fences before and waits
// after. Each thread holds rows and columns of its warp's 16 rows as tile/layout.cuh has them.
#pragma once
#include "layout.cuh"
#include "swizzled_tile.cuh"

// Columns [FIRST, FIRST + KEYS) of rS[64, …] = sQ[64, WIDTH] · sK[KEYS, WIDTH]ᵀ, in steps of 16 columns of both; the last may
// reach into the zeros behind WIDTH. The next 64 columns of K are `k_block_bytes` on.
template <class Element, int WIDTH, int FIRST, int KEYS, int TILES>
DEVICE void issue_qk_part(float (&rS)[TILES][4], uint32_t sQ, uint32_t sK, int k_block_bytes) {
  using QTile = SwizzledTile<WIDTH, 64>;
  const MatrixDescriptor q(sQ, QTile::BLOCK_BYTES), k(sK + FIRST * QTile::PITCH_BYTES, k_block_bytes);
  auto& part = reinterpret_cast<float(&)[KEYS / 8][4]>(rS[FIRST / 8]);
#pragma unroll
  for (int step = 0; step < (WIDTH + 15) / 16; step++) {
    const int block = step / 4, column = step % 4 * 32;
    ptx::wgmma_m64nNk16(typename Element::Tag(), part, q.at(block * QTile::BLOCK_BYTES + column),
                        k.at(block * k_block_bytes + column), step > 0);
  }
}

// The first KEYS columns of rS: a product of at most 256 columns, or two.
template <class Element, int WIDTH, int KEYS, int TILES>
DEVICE void issue_qk(float (&rS)[TILES][4], uint32_t sQ, uint32_t sK,
                     int k_block_bytes = SwizzledTile<WIDTH, KEYS>::BLOCK_BYTES) {
  constexpr int SECOND = 128, FIRST = KEYS <= 256 ? KEYS : KEYS - SECOND;
  issue_qk_part<Element, WIDTH, 0, FIRST>(rS, sQ, sK, k_block_bytes);
  if constexpr (FIRST < KEYS) issue_qk_part<Element, WIDTH, FIRST, SECOND>(rS, sQ, sK, k_block_bytes);
}

// rO[64, WIDTH] += rP[64, KEYS] · sV[KEYS, WIDTH]. The next 64 columns of V are `v_block_bytes` on.
template <class Element, int WIDTH, int KEYS, int STEPS>
DEVICE void issue_pv(float (&rO)[WIDTH / 8][4], const uint32_t (&rP)[STEPS][4], uint32_t sV,
                     int v_block_bytes = SwizzledTile<WIDTH, KEYS>::BLOCK_BYTES) {
  using Tile = SwizzledTile<WIDTH, KEYS>;
  const MatrixDescriptor v(sV, v_block_bytes);
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
    ptx::wgmma_m64nNk16(typename Element::Tag(), rO, rP[step], v.at(step * 16 * Tile::PITCH_BYTES), true);
  }
}

// Probabilities of the first KEYS columns as the A operand of the second product: two packed accumulators a step.
template <class Element, int KEYS, int STEPS, int TILES>
DEVICE void pack_probabilities(uint32_t (&rP)[STEPS][4], const float (&rS)[TILES][4]) {
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float(&pair)[4] = rS[2 * step + i / 2];
      rP[step][i] = Element::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
  }
}
