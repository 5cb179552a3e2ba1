// The whole backward over branches of few keys: IP-Adapter's decoupled cross-attention, text and image prompts.
//
//   g_i  = Σ_j P_ij (dout_i · v_j)     dS_ij = w_i P_ij (dout_i · v_j - g_i)        docs/math.md, equations 8 to 11
//
// A block belongs to one head. Keys and values of all branches stay in its shared memory; it walks over the queries, 64 at a
// time, and reads q and dout once:
//
//   each warp, 16 queries   per branch: S and dP of all keys in registers -> whole-row softmax -> g -> dS -> dQ += dS K
//                           of segments whose gradients are wanted, P and dS rounded -> shared memory
//   then all warps          dV += Pᵀ dout, dK += dSᵀ Q, 16 keys by 16 columns each, added to f32 sums in shared memory
//
// Nothing was saved by the forward, nothing is computed twice, and nothing for keys whose gradients nobody wants: training an
// adapter leaves those of the text out. dk and dv of the blocks, and g for the gradients of gates and regions, are added up
// afterwards (backward_reduce_sm80.cuh): no atomics, so two runs give the same bits.
// Precision: as on the queries' and keys' sides of the streaming kernels.
// The host guarantees, besides what those ask for: the padded keys of each branch fit ROW_KEYS, those of all branches and the
// sums of the gradients the shared memory of the launch; no softcap.
#pragma once
#include "params.h"
#include "tile/branch.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"
#include "tile/resident_gradients.cuh"
#include "tile/resident_keys.cuh"
#include "tile/statistics.cuh"
#include "tile/store.cuh"

template <class Element_, int WIDTH_, int ROW_KEYS_>
struct BackwardShortConfig {
  using Element = Element_;
  static constexpr int WIDTH = WIDTH_;        // of the tiles; head_dim and value_dim may be less
  static constexpr int ROW_KEYS = ROW_KEYS_;  // of one branch, padded
  static constexpr int BLOCK_KV = ROW_KEYS;   // all keys of a branch are one tile
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCK_Q = WARPS * 16;
  static constexpr int STAGES = WIDTH <= 64 ? 2 : 1;
  static constexpr bool IN_REGISTERS = WIDTH <= 64;

  using Tile = SharedTile<WIDTH>;
  using Gradients = ResidentGradients<Element, WIDTH, WARPS>;
  static constexpr int ROWS_BYTES = Tile::bytes(BLOCK_Q);
  static constexpr int KEYS_BYTES = Tile::bytes(16);
  // `key_tiles` is the sum over all segments of seq_kv / 16, rounded up, `gradient_tiles` that over those with a gradient.
  static constexpr int shared_bytes(int /* branches */, int key_tiles, int gradient_tiles) {
    return STAGES * 2 * ROWS_BYTES + key_tiles * 2 * KEYS_BYTES + Gradients::bytes(gradient_tiles);
  }
  static_assert(ROW_KEYS % 16 == 0, "keys are taken 16 at a time");
};

template <class Config>
struct BackwardShort {
  using Element = typename Config::Element;
  static constexpr int WIDTH = Config::WIDTH, BLOCK_Q = Config::BLOCK_Q;
  static constexpr int KEY_TILES = Config::ROW_KEYS / 16;

  const BackwardParams& p;
  const ForwardParams& f;
  const int b, h, slot;
  const uint32_t sQ0;
  const ResidentKeys<WIDTH, Config::THREADS> keys;
  const typename Config::Gradients gradients;

  RowsA<WIDTH, Config::IN_REGISTERS> q, dout;
  float rDq[WIDTH / 8][4];
  PowerOfTwo factor[ROWS_PER_LANE];

  DEVICE BackwardShort(const BackwardParams& p, int b, int h, int slot)
      : p(p),
        f(p.forward),
        b(b),
        h(h),
        slot(slot),
        sQ0(ptx::shared_address(ptx::dynamic_shared())),
        keys(p.forward, b, h, sQ(Config::STAGES)),
        gradients(p, ptx::dynamic_shared() + (keys.end() - sQ0), b, h, slot) {}

  // Queries [64 t, 64 t + 64) for t = slot, slot + head_blocks, …
  DEVICE void run() {
    const int tiles = (f.seq_q + BLOCK_Q - 1) / BLOCK_Q;
    keys.load(branches());
    if (slot < tiles) load_queries(slot, 0);
    ptx::cp_async_commit_group();
    gradients.clear();
    ptx::cp_async_wait_group<0>();
    // Written: keys, values and the first queries, by every thread's copies. Read next: by every warp.
    ptx::barrier_cta();
    int stage = 0;
    for (int t = slot; t < tiles; t += f.head_blocks) {
      const int next = t + f.head_blocks;
      if (Config::STAGES == 2 && next < tiles) load_queries(next, stage ^ 1);
      attend(t * BLOCK_Q, stage);
      // Written: P and dS, each warp its queries, and the powers of two. Read next: by every warp.
      ptx::barrier_cta();
      gradients.add(sQ(stage), sDout(stage));
      if (Config::STAGES == 1) {
        // Read: the queries, by every warp. Written next: by the copies of the following ones.
        ptx::barrier_cta();
        if (next < tiles) load_queries(next, stage);
      } else {
        stage ^= 1;
      }
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      // Written: the next queries, by every thread's copies; read next by every warp. Read: P and dS, by every warp; written
      // next by the following iteration.
      ptx::barrier_cta();
    }
    gradients.store();
  }

 private:
  // Shared memory: Q, dout of each stage | K of all tiles | V | what the gradients of keys and values take
  DEVICE uint32_t sQ(int stage) const { return sQ0 + stage * 2 * Config::ROWS_BYTES; }
  DEVICE uint32_t sDout(int stage) const { return sQ(stage) + Config::ROWS_BYTES; }

  // Those that something is asked of.
  DEVICE BranchSet branches() const { return {p.branches, p.g_branches}; }

  DEVICE void load_queries(int t, int stage) {
    const uint16_t* gQ = static_cast<const uint16_t*>(f.q) + b * f.q_stride[0] + h * f.q_stride[2];
    const uint16_t* gDout = static_cast<const uint16_t*>(p.dout) + b * p.dout_stride[0] + h * p.dout_stride[2];
    load_rows<WIDTH, BLOCK_Q, Config::THREADS>(sQ(stage), gQ, f.q_stride[1], t * BLOCK_Q, f.seq_q, f.head_dim, threadIdx.x);
    load_rows<WIDTH, BLOCK_Q, Config::THREADS>(sDout(stage), gDout, p.dout_stride[1], t * BLOCK_Q, f.seq_q, f.value_dim,
                                                threadIdx.x);
  }

  // Sixty-four queries over all branches: dq, and P and dS for the other two products.
  DEVICE void attend(int first, int stage) {
    const int row = first + warp_id() * 16;
    q.load(sQ(stage), warp_id() * 16);
    dout.load(sDout(stage), warp_id() * 16);
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) factor[r] = factor_of(f, b, h, row + fragment_row(2 * r));
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rDq[n][i] = 0.0f;
    }
    int tile = 0, gradient_tile = 0;
    for (int n = 0; n < f.branches; n++) attend_branch(n, first, row, tile, gradient_tile);
    if (p.dq.to == nullptr) return;
    const float scale[ROWS_PER_LANE] = {factor[0].up * f.softmax_scale, factor[1].up * f.softmax_scale};
    store_gradient<Element, WIDTH>(p.dq, {0, b, h, row, f.seq_q, 0, f.head_dim}, rDq, scale);
  }

  // One branch, whose keys start at `tile`, those with a gradient at `gradient_tile`; both move on to the next branch's.
  DEVICE void attend_branch(int number, int first, int row, int& tile, int& gradient_tile) {
    const BranchParams& branch = f.branch[number];
    const float gate = gate_of(branch, b, h);
    const bool skip = !branches().has(number, gate), closed = gate == 0.0f;
    const PowerOfTwo common = common_factor(branch, first);
    gradients.scale(number, common.up);
    float rS[KEY_TILES][2][4], rD[KEY_TILES][2][4];
    float max[ROWS_PER_LANE] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};

    // The whole row. The segment and the key of a tile move on with it, all the same for the warp.
    int s = branch.first_segment, kv = 0, count = 0;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
      while (s < branch.end_segment && kv >= f.segment[s].seq_kv) s++, kv = 0;
      if (s >= branch.end_segment) continue;
      count = n + 1;
      if (!skip) {
        const SegmentParams& segment = f.segment[s];
        const int key_len = key_len_of(segment, b);
        const Mask mask{segment, b, h, f.seq_q, key_len};
        product_qk<Element, 16>(rS[n], q, keys.sK(tile + n));
        product_qk<Element, 16>(rD[n], dout, keys.sV(tile + n));
        mask.template cap<16>(rS[n], f);
        mask.template admit<16>(rS[n], row, kv, all_attend(segment, f.seq_q, row, 16, kv, 16, key_len));
#pragma unroll
        for (int i = 0; i < 8; i++) max[i % 4 / 2] = max_of(rS[n][i / 4][i % 4], max[i % 4 / 2]);
      }
      kv += 16;
    }
    LaneStatistics statistics;
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) statistics.rows[r] = {shift_of(quad_max(max[r])), 0.0f, 0.0f};
    float sum[ROWS_PER_LANE] = {0.0f, 0.0f}, product[ROWS_PER_LANE] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
      if (n >= count || skip) continue;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& s = rS[n][i / 4][i % 4];
        s = ptx::ex2_approx_ftz_f32((s - statistics.rows[i % 4 / 2].shift) * LOG2E);
        sum[i % 4 / 2] += s;
        product[i % 4 / 2] += s * rD[n][i / 4][i % 4];
      }
    }
    float to_dq[ROWS_PER_LANE], to_keys[ROWS_PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      const float total = quad_sum(sum[r]), inverse = total == 0.0f ? 0.0f : 1.0f / total;
      const float region = region_of(branch, f, b, h, query);
      Statistics& of_row = statistics.rows[r];
      of_row.inverse = inverse;
      of_row.g = quad_sum(product[r]) * inverse;
      if (p.statistics != nullptr && !skip) store_statistics(p, number, b, h, query, of_row);
      to_dq[r] = gate * region * factor[r].down;
      to_keys[r] = region * common.down;
    }

    s = branch.first_segment, kv = 0;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++) {
      while (s < branch.end_segment && kv >= f.segment[s].seq_kv) s++, kv = 0;
      if (s >= branch.end_segment) continue;
      kv += 16;
      uint32_t rP[2][2], rDs[2][2], rDq_ds[2][2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int r = 0; r < ROWS_PER_LANE; r++) {
          const Statistics& of_row = statistics.rows[r];
          const float low = rS[n][i][2 * r] * of_row.inverse, high = rS[n][i][2 * r + 1] * of_row.inverse;
          const float ds_low = low * (rD[n][i][2 * r] - of_row.g), ds_high = high * (rD[n][i][2 * r + 1] - of_row.g);
          // A closed gate got here for its g alone: not even NaN may pass it.
          rP[i][r] = closed ? 0 : Element::pack(low * to_keys[r], high * to_keys[r]);
          rDs[i][r] = closed ? 0 : Element::pack(ds_low * to_keys[r], ds_high * to_keys[r]);
          rDq_ds[i][r] = Element::pack(ds_low * to_dq[r], ds_high * to_dq[r]);
        }
      }
      if (gradients.wanted(s)) gradients.write(gradient_tile++, rP, rDs);
      if (!closed && p.dq.to != nullptr) product_pv<Element, WIDTH, 16>(rDq, rDq_ds, keys.sK(tile + n));
    }
    tile += count;
  }

  // That of the largest |region| of the block's 64 queries: what sums over queries can have taken out of them. The gate is
  // the same for all of them, and enters at the store.
  DEVICE PowerOfTwo common_factor(const BranchParams& branch, int first) const {
    if (branch.region == nullptr) return {1.0f, 1.0f};
    float largest = 0.0f;
    for (int i = lane_id(); i < BLOCK_Q; i += WARP) {
      const float region = region_of(branch, f, b, h, first + i);
      largest = max_of(region < 0.0f ? -region : region, largest);
    }
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2) largest = max_of(largest, ptx::shfl_bfly_f32(largest, mask));
    return PowerOfTwo::of(largest);
  }
};

// One block: which head, and which of its queries.
template <class Config>
DEVICE void backward_short(const BackwardParams& p) {
  const ForwardParams& f = p.forward;
  const int heads_before = blockIdx.x / f.head_blocks, slot = blockIdx.x % f.head_blocks;
  BackwardShort<Config>(p, heads_before / f.heads, heads_before % f.heads, slot).run();
}
