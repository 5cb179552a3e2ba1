// Forward attention over branches of few keys: IP-Adapter's decoupled cross-attention, text and image prompts.
//
//   out_i = Σ_b (w_bi / l_bi) Σ_j exp(S_ij - m_bi) v_j        docs/math.md, equations 1 to 3 and 7
//
// A block belongs to one head. Keys and values of all branches stay in its shared memory; its warps walk over the queries,
// 16 at a time, each warp by itself:
//
//   shared   K of branch 0 | K of branch 1 | …   V likewise, every segment padded to 16 rows with zeros
//   warp     Q ring of two stages: 16 queries in use, 16 on their way (cp.async)
//            per branch: S[16, keys] in registers → whole-row softmax → P · w / l, rounded → rO += P V
//
// The weight w / l is known before the second product, so all branches share one accumulator: no rescaling, no second
// result. Q is read once, out written once, keys and values once per block; after they have come, no barrier of the block
// is left.
// Precision: as in the streaming kernel, but P is rounded with its weight. A power of two common to the branches of a row,
// that of its largest |gate · region|, is taken out of the weights and put back at the end, both exact: so neither gates
// of 1e-4 nor of 3000 leave the range of f16.
// The host guarantees, besides what the streaming kernel asks for: the padded keys of each branch fit ROW_KEYS, those of all
// branches the shared memory of the launch.
#pragma once
#include "params.h"
#include "tile/branch.cuh"
#include "tile/load.cuh"
#include "tile/mask.cuh"
#include "tile/product.cuh"
#include "tile/resident_keys.cuh"
#include "tile/softmax.cuh"
#include "tile/store.cuh"

template <class Element_, int WIDTH_, int ROW_KEYS_>
struct ShortConfig {
  using Element = Element_;
  static constexpr int WIDTH = WIDTH_;        // of the tiles; head_dim and value_dim may be less
  static constexpr int ROW_KEYS = ROW_KEYS_;  // of one branch, padded
  static constexpr int BLOCK_KV = ROW_KEYS;   // all keys of a branch are one tile
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCK_Q = WARPS * 16;
  static constexpr int STAGES = 2;
  static constexpr bool Q_IN_REGISTERS = WIDTH <= 128;

  using Tile = SharedTile<WIDTH>;
  static constexpr int TILE_BYTES = Tile::bytes(16);
  static constexpr int RING_BYTES = WARPS * STAGES * TILE_BYTES;
  // `key_tiles` is the sum over all segments of seq_kv / 16, rounded up.
  static constexpr int shared_bytes(int /* branches */, int key_tiles, int /* gradient_tiles */) {
    return RING_BYTES + 2 * key_tiles * TILE_BYTES;
  }
  static_assert(ROW_KEYS % 16 == 0, "keys are taken 16 at a time");
};

template <class Config>
struct ForwardShort {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  static constexpr int WIDTH = Config::WIDTH;
  static constexpr int KEY_TILES = Config::ROW_KEYS / 16;

  const ForwardParams& p;
  const int b, h;
  char* const shared;
  const uint32_t sShared;
  const ResidentKeys<WIDTH, Config::THREADS> keys;

  RowsA<WIDTH, Config::Q_IN_REGISTERS> q;
  float rO[WIDTH / 8][4];
  PowerOfTwo factor[ROWS_PER_LANE];

  DEVICE ForwardShort(const ForwardParams& p, int b, int h)
      : p(p),
        b(b),
        h(h),
        shared(ptx::dynamic_shared()),
        sShared(ptx::shared_address(shared)),
        keys(p, b, h, sShared + Config::RING_BYTES) {}

  // Queries [16 t, 16 t + 16) for t = first, first + step, …
  DEVICE void run(int first, int step) {
    keys.load(BranchSet::of(p));
    const int tiles = (p.seq_q + 15) / 16;
    if (first < tiles) load_q(first, 0);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    // Written: keys and values, by every thread's copies. Read next: by every warp, and never written again.
    ptx::barrier_cta();
    int stage = 0;
    for (int t = first; t < tiles; t += step, stage ^= 1) {
      // Written: this stage, by the copies of the warp's lanes. Read next: by all its lanes. Read: the other stage, by lanes
      // that stored out from it; written next by the copies below.
      ptx::cp_async_wait_group<0>();
      ptx::bar_warp_sync();
      if (t + step < tiles) load_q(t + step, stage ^ 1);
      ptx::cp_async_commit_group();
      attend(t * 16, stage);
    }
  }

 private:
  DEVICE uint32_t q_offset(int stage) const { return (warp_id() * Config::STAGES + stage) * Config::TILE_BYTES; }
  DEVICE void load_q(int t, int stage) {
    const uint16_t* gQ = static_cast<const uint16_t*>(p.q) + b * p.q_stride[0] + h * p.q_stride[2];
    load_rows<WIDTH, 16, WARP>(sShared + q_offset(stage), gQ, p.q_stride[1], t * 16, p.seq_q, p.head_dim, lane_id());
  }

  // Sixteen queries over all branches.
  DEVICE void attend(int row, int stage) {
    q.load(sShared + q_offset(stage), 0);
    find_factors(row);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] = 0.0f;
    }
    int tile = 0;
    for (int n = 0; n < p.branches; n++) tile = attend_branch(n, row, tile);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] *= factor[i / 2].up;
    }
    // The queries are in registers or read for the last time, by ldmatrix, which all lanes execute together: their place in
    // the ring takes out.
    const OutRows out{p, b, h, row};
    out.store<Element, WIDTH>(rO, shared + q_offset(stage), p.accumulate != 0);
  }

  DEVICE void find_factors(int row) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) factor[r] = factor_of(p, b, h, row + fragment_row(2 * r));
  }

  // rO += weight · P V of one branch, whose keys start at `tile`; returns where the next branch's start.
  DEVICE int attend_branch(int number, int row, int tile) {
    const BranchParams& branch = p.branch[number];
    const float gate = gate_of(branch, b, h);
    const bool skip = !BranchSet::of(p).has(number, gate);
    float rS[KEY_TILES][2][4];
    float max[ROWS_PER_LANE] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};

    // Logits of the whole row. The segment and the key of a tile move on with it, all the same for the warp.
    int s = branch.first_segment, kv = 0, count = 0;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
      while (s < branch.end_segment && kv >= p.segment[s].seq_kv) s++, kv = 0;
      if (s >= branch.end_segment) continue;
      count = n + 1;
      if (!skip) {
        const SegmentParams& segment = p.segment[s];
        const int key_len = key_len_of(segment, b);
        const Mask mask{segment, b, h, p.seq_q, key_len};
        product_qk<Element, 16>(rS[n], q, keys.sK(tile + n));
        mask.cap<16>(rS[n], p);
        mask.admit<16>(rS[n], row, kv, all_attend(segment, p.seq_q, row, 16, kv, 16, key_len));
#pragma unroll
        for (int i = 0; i < 8; i++) max[i % 4 / 2] = max_of(rS[n][i / 4][i % 4], max[i % 4 / 2]);
      }
      kv += 16;
    }
    if (skip) return tile + count;

    float weight[ROWS_PER_LANE], shift[ROWS_PER_LANE], sum[ROWS_PER_LANE] = {0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      max[r] = quad_max(max[r]);
      shift[r] = shift_of(max[r]);
    }
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
      if (n >= count) continue;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& s = rS[n][i / 4][i % 4];
        s = ptx::ex2_approx_ftz_f32((s - shift[i % 4 / 2]) * LOG2E);
        sum[i % 4 / 2] += s;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      const float total = quad_sum(sum[r]);
      store_lse(p, number, b, h, query, lse_of(max[r], total));
      weight[r] = total == 0.0f ? 0.0f : gate * region_of(branch, p, b, h, query) * factor[r].down / total;
    }
    // A closed gate got here for its lse alone: not even NaN may pass it.
    if (gate == 0.0f) return tile + count;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
      if (n >= count) continue;
      uint32_t rP[2][2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int r = 0; r < ROWS_PER_LANE; r++) {
          rP[i][r] = Element::pack(rS[n][i][2 * r] * weight[r], rS[n][i][2 * r + 1] * weight[r]);
        }
      }
      product_pv<Element, WIDTH, 16>(rO, rP, keys.sV(tile + n));
    }
    return tile + count;
  }
};

// One block: which head, and which of its queries.
template <class Config>
DEVICE void forward_short(const ForwardParams& p) {
  const int heads_before = blockIdx.x / p.head_blocks, slot = blockIdx.x % p.head_blocks;
  ForwardShort<Config>(p, heads_before / p.heads, heads_before % p.heads)
      .run(slot * Config::WARPS + warp_id(), p.head_blocks * Config::WARPS);
}
