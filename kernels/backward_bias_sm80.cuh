// dbias, summed over whatever the bias broadcasts over:
//
//   dbias_ij = Σ w_i P_ij (dout_i · v_j - g_i)        docs/math.md, equation 11; Σ over batch entries, heads, queries or keys
//
// One block has a tile of the bias's own index space, 64 queries by BLOCK_KV keys, or all of them along an extent of 1. For
// each batch entry, head and tile of attention that this tile stands for it forms dS anew, each of the four warps 16 rows, and
// adds it up in registers; rows or columns that the bias does not tell apart are added up at the end. Nothing of the size
// seq_q x seq_kv is kept, unless the bias has it.
//
// Where there are few tiles several blocks share one, and the parts are added up afterwards (backward_reduce_sm80.cuh).
// Precision: all in f32 but the inputs of the two products.
#pragma once
#include "params.h"
#include "tile/branch.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"
#include "tile/statistics.cuh"

template <class Element_, int WIDTH_, int BLOCK_KV_>
struct BackwardBiasConfig {
  using Element = Element_;
  static constexpr int WIDTH = WIDTH_;        // of the tiles; head_dim and value_dim may be less
  static constexpr int BLOCK_KV = BLOCK_KV_;  // keys of a tile
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCK_Q = WARPS * 16;

  using Tile = SharedTile<WIDTH>;
  static constexpr int ROWS_BYTES = Tile::bytes(BLOCK_Q);
  static constexpr int KEYS_BYTES = Tile::bytes(BLOCK_KV);
  static constexpr int shared_bytes(int /* branches */, int /* key_tiles */, int /* gradient_tiles */) {
    return 2 * ROWS_BYTES + 2 * KEYS_BYTES;
  }
  // The tile of sums takes the place of the inputs in the end.
  static_assert(BLOCK_Q * BLOCK_KV * 4 <= 2 * ROWS_BYTES + 2 * KEYS_BYTES, "the sums fit");
};

template <class Config>
struct BackwardBias {
  using Element = typename Config::Element;
  static constexpr int WIDTH = Config::WIDTH, BLOCK_KV = Config::BLOCK_KV, BLOCK_Q = Config::BLOCK_Q;

  const BackwardParams& p;
  const ForwardParams& f;
  const int segment;
  const SegmentParams& s;
  const SegmentGradients& to;
  int branch;
  int b, h, row, kv, part;  // of the tile of the bias; 0 along extents of 1
  float* const sSums;
  const uint32_t sQ, sDout, sK, sV;
  float rSum[BLOCK_KV / 8][4];

  DEVICE BackwardBias(const BackwardParams& p, int segment, int block)
      : p(p),
        f(p.forward),
        segment(segment),
        s(f.segment[segment]),
        to(p.segment[segment]),
        branch(0),
        sSums(reinterpret_cast<float*>(ptx::dynamic_shared())),
        sQ(ptx::shared_address(sSums)),
        sDout(sQ + Config::ROWS_BYTES),
        sK(sDout + Config::ROWS_BYTES),
        sV(sK + Config::KEYS_BYTES) {
    while (segment >= f.branch[branch].end_segment) branch++;
    part = block % to.bias_parts, block /= to.bias_parts;
    kv = block % tiles(3, BLOCK_KV) * BLOCK_KV, block /= tiles(3, BLOCK_KV);
    row = block % tiles(2, BLOCK_Q) * BLOCK_Q, block /= tiles(2, BLOCK_Q);
    h = block % to.bias_extent[1], b = block / to.bias_extent[1];
  }

  DEVICE void run() {
#pragma unroll
    for (int n = 0; n < BLOCK_KV / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rSum[n][i] = 0.0f;
    }
    // What one element of the bias stands for: so many batch entries, heads, tiles of queries and of keys.
    const int keys = to.bias_extent[3] == 1 ? (s.seq_kv + BLOCK_KV - 1) / BLOCK_KV : 1;
    const int queries = to.bias_extent[2] == 1 ? (f.seq_q + BLOCK_Q - 1) / BLOCK_Q : 1;
    const int heads = to.bias_extent[1] == 1 ? f.heads : 1, batches = to.bias_extent[0] == 1 ? f.batch : 1;
    const int units = keys * queries * heads * batches;
    for (int unit = part; unit < units; unit += to.bias_parts) {
      const int rest = unit / keys;
      add(b + rest / queries / heads, h + rest / queries % heads, row + rest % queries * BLOCK_Q,
          kv + unit % keys * BLOCK_KV);
    }
    store();
  }

 private:
  // Tiles of the bias along one of its dimensions.
  DEVICE int tiles(int dim, int size) const { return (to.bias_extent[dim] + size - 1) / size; }

  // The tile of dS of one head at a query and a key.
  DEVICE void add(int b, int h, int row, int kv) {
    const float gate = gate_of(f.branch[branch], b, h);
    const int key_len = key_len_of(s, b);
    const int begin = keys_of_row(s, f.seq_q, row, key_len).begin;
    const int end = keys_of_row(s, f.seq_q, min_of(row + BLOCK_Q, f.seq_q) - 1, key_len).end;
    if (gate == 0.0f || begin >= kv + BLOCK_KV || kv >= end) return;

    const int head = h / s.group;
    const uint16_t* gQ = static_cast<const uint16_t*>(f.q) + b * f.q_stride[0] + h * f.q_stride[2];
    const uint16_t* gDout = static_cast<const uint16_t*>(p.dout) + b * p.dout_stride[0] + h * p.dout_stride[2];
    const uint16_t* gK = static_cast<const uint16_t*>(s.k) + b * s.k_stride[0] + head * s.k_stride[2];
    const uint16_t* gV = static_cast<const uint16_t*>(s.v) + b * s.v_stride[0] + head * s.v_stride[2];
    // Read: the tiles of the unit before, by every warp. Written next: by the copies below.
    ptx::barrier_cta();
    load_rows<WIDTH, BLOCK_Q, Config::THREADS>(sQ, gQ, f.q_stride[1], row, f.seq_q, f.head_dim, threadIdx.x);
    load_rows<WIDTH, BLOCK_Q, Config::THREADS>(sDout, gDout, p.dout_stride[1], row, f.seq_q, f.value_dim, threadIdx.x);
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sK, gK, s.k_stride[1], kv, end, f.head_dim, threadIdx.x);
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sV, gV, s.v_stride[1], kv, end, f.value_dim, threadIdx.x);
    ptx::cp_async_commit_group();
    const int first = row + warp_id() * 16;
    LaneStatistics statistics;
    statistics.load(p, branch, b, h, first);
    float weight[ROWS_PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      weight[r] = gate * region_of(f.branch[branch], f, b, h, first + fragment_row(2 * r));
    }
    ptx::cp_async_wait_group<0>();
    // Written: the tiles, by every thread's copies. Read next: by every warp.
    ptx::barrier_cta();

    RowsA<WIDTH, WIDTH % 16 != 0> rows;
    float rS[BLOCK_KV / 8][4], rD[BLOCK_KV / 8][4];
    rows.load(sQ, warp_id() * 16);
    product_qk<Element, BLOCK_KV>(rS, rows, sK);
    rows.load(sDout, warp_id() * 16);
    product_qk<Element, BLOCK_KV>(rD, rows, sV);
    const Mask mask{s, b, h, f.seq_q, key_len};
    mask.template cap<BLOCK_KV>(rS, f);
    subtract_g<BLOCK_KV>(rD, statistics);
    mask.template admit<BLOCK_KV>(rS, first, kv, false);
    probabilities<BLOCK_KV>(rS, statistics);
#pragma unroll
    for (int n = 0; n < BLOCK_KV / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rSum[n][i] += weight[i / 2] * rS[n][i] * rD[n][i];
    }
  }

  // Adds up what the bias does not tell apart, and writes the part.
  DEVICE void store() {
    // Read: the tiles of the last unit, by every warp. Written next: the sums, in their place.
    ptx::barrier_cta();
#pragma unroll
    for (int n = 0; n < BLOCK_KV / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sSums[(warp_id() * 16 + fragment_row(i)) * BLOCK_KV + n * 8 + fragment_column(i)] = rSum[n][i];
      }
    }
    // Written: the sums, each by the lane that has it. Read next: by whichever thread writes the element.
    ptx::barrier_cta();
    const bool one_query = to.bias_extent[2] == 1, one_key = to.bias_extent[3] == 1;
    const int rows = one_query ? 1 : BLOCK_Q, columns = one_key ? 1 : BLOCK_KV;
    for (int at = threadIdx.x; at < rows * columns; at += Config::THREADS) {
      const int i = row + at / columns, j = kv + at % columns;
      if (i >= to.bias_extent[2] || j >= to.bias_extent[3]) continue;
      float sum = 0.0f;
      for (int r = 0; r < (one_query ? BLOCK_Q : 1); r++) {
        for (int c = 0; c < (one_key ? BLOCK_KV : 1); c++) sum += sSums[(at / columns + r) * BLOCK_KV + at % columns + c];
      }
      to.dbias[part * to.dbias_stride[0] + b * to.dbias_stride[1] + h * to.dbias_stride[2] + i * to.dbias_stride[3] +
               j * to.dbias_stride[4]] = sum;
    }
  }
};

// One block: which tile of which bias, and the work.
template <class Config>
DEVICE void backward_bias(const BackwardParams& p) {
  int segment = 0, block = blockIdx.x;
  for (; block >= p.segment[segment].bias_blocks; segment++) block -= p.segment[segment].bias_blocks;
  BackwardBias<Config>(p, segment, block).run();
}
