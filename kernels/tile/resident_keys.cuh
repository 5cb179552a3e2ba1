// Keys and values of all branches in shared memory, for as long as the block lives: 16 rows a tile, K of all tiles, then V.
#pragma once
#include "branch.cuh"
#include "load.cuh"
#include "mask.cuh"

template <int WIDTH, int THREADS>
struct ResidentKeys {
  static constexpr int TILE_BYTES = SharedTile<WIDTH>::bytes(16);

  const ForwardParams& p;
  const int b, h;
  const uint32_t sKeys;
  const int tiles;  // over all segments

  // From a window address on.
  DEVICE ResidentKeys(const ForwardParams& p, int b, int h, uint32_t sKeys)
      : p(p), b(b), h(h), sKeys(sKeys), tiles(count(p)) {}

  DEVICE uint32_t sK(int tile) const { return sKeys + tile * TILE_BYTES; }
  DEVICE uint32_t sV(int tile) const { return sK(tiles + tile); }
  // Where they end.
  DEVICE uint32_t end() const { return sK(2 * tiles); }

  // Starts the copies of these branches; keys of others have their place and are not even loaded.
  DEVICE void load(const BranchSet& branches) const {
    int tile = 0;
    for (int n = 0; n < p.branches; n++) {
      const BranchParams& branch = p.branch[n];
      const bool loaded = branches.has(n, gate_of(branch, b, h));
      for (int i = branch.first_segment; i < branch.end_segment; i++) {
        const SegmentParams& s = p.segment[i];
        const int head = h / s.group, end = loaded ? key_len_of(s, b) : 0;
        const uint16_t* gK = static_cast<const uint16_t*>(s.k) + b * s.k_stride[0] + head * s.k_stride[2];
        const uint16_t* gV = static_cast<const uint16_t*>(s.v) + b * s.v_stride[0] + head * s.v_stride[2];
        for (int kv = 0; kv < s.seq_kv; kv += 16, tile++) {
          if (!loaded) continue;
          load_rows<WIDTH, 16, THREADS>(sK(tile), gK, s.k_stride[1], kv, end, p.head_dim, threadIdx.x);
          load_rows<WIDTH, 16, THREADS>(sV(tile), gV, s.v_stride[1], kv, end, p.value_dim, threadIdx.x);
        }
      }
    }
  }

 private:
  static DEVICE int count(const ForwardParams& p) {
    int tiles = 0;
    for (int s = 0; s < p.branch[p.branches - 1].end_segment; s++) tiles += (p.segment[s].seq_kv + 15) / 16;
    return tiles;
  }
};
