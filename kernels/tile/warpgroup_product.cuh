// The two products of attention on 64 query rows of a warpgroup. Both are only issued: the caller fences before and waits
// after. Each thread holds rows and columns of its warp's 16 rows as tile/layout.cuh has them.
#pragma once
#include "layout.cuh"
#include "swizzled_tile.cuh"

// rS[64, KEYS] = sQ[64, WIDTH] · sK[KEYS, WIDTH]ᵀ, in steps of 16 columns; the last may reach into the zeros behind WIDTH.
template <class Element, int WIDTH, int KEYS>
DEVICE void issue_qk(float (&rS)[KEYS / 8][4], uint32_t sQ, uint32_t sK) {
  using QTile = SwizzledTile<WIDTH, 64>;
  using KTile = SwizzledTile<WIDTH, KEYS>;
  const MatrixDescriptor q(sQ, QTile::BLOCK_BYTES), k(sK, KTile::BLOCK_BYTES);
#pragma unroll
  for (int step = 0; step < (WIDTH + 15) / 16; step++) {
    const int block = step / 4, column = step % 4 * 32;
    ptx::wgmma_m64nNk16(typename Element::Tag(), rS, q.at(block * QTile::BLOCK_BYTES + column),
                        k.at(block * KTile::BLOCK_BYTES + column), step > 0);
  }
}

// rO[64, WIDTH] += rP[64, KEYS] · sV[KEYS, WIDTH].
template <class Element, int WIDTH, int KEYS>
DEVICE void issue_pv(float (&rO)[WIDTH / 8][4], const uint32_t (&rP)[KEYS / 16][4], uint32_t sV) {
  using Tile = SwizzledTile<WIDTH, KEYS>;
  const MatrixDescriptor v(sV, Tile::BLOCK_BYTES);
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
    ptx::wgmma_m64nNk16(typename Element::Tag(), rO, rP[step], v.at(step * 16 * Tile::PITCH_BYTES), true);
  }
}

// Probabilities as the A operand of the second product: two packed accumulators a step.
template <class Element, int KEYS>
DEVICE void pack_probabilities(uint32_t (&rP)[KEYS / 16][4], const float (&rS)[KEYS / 8][4]) {
#pragma unroll
  for (int step = 0; step < KEYS / 16; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float(&pair)[4] = rS[2 * step + i / 2];
      rP[step][i] = Element::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
  }
}
