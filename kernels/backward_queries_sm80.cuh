// The queries' side of the backward: the statistics of every query's softmax, and dq.
//
//   g_i  = Σ_j P_ij (dout_i · v_j)                                   docs/math.md, equation 8
//   dq_i = softmax_scale · Σ_b Σ_j w_bi P_ij (dout_i · v_j - g_bi) cap'(z_ij) k_j        equations 9 to 11
//
// One block computes 64 queries of one head; each of its four warps has 16 of them and sees all keys, twice: the first
// sweep finds maximum, denominator and g of each branch and writes them down, also for the kernels of the keys' side; the
// second one needs them to form dS. Q and dout are read once, tiles of K and V pass through a ring of two stages.
//
//   warp   S = Q Kᵀ  dP = dout Vᵀ     in registers, 16 x BLOCK_KV each
//          dS = w P (dP - g) cap'     rounded, an A operand as it lies
//          dQ += dS K                 in registers, 16 x WIDTH, f32
//
// With one branch whose lse and out the forward saved there is no first sweep: shift is lse, and w g is dout · out. Not for
// blocks with an lse so large that f32 keeps too few digits of it behind the point.
// Precision: products, softmax, gates, regions in f32; dS is rounded to the element type, after a power of two common to
// the branches of the row was taken out; dq once at the store.
// The host guarantees: head_dim and value_dim are multiples of 8 and at most WIDTH, rows of q, k, v, dout, out and dq start at
// multiples of 16 bytes, at most MAX_BRANCHES branches and MAX_SEGMENTS segments.
#pragma once
#include "params.h"
#include "tile/cursor.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"
#include "tile/statistics.cuh"
#include "tile/store.cuh"

template <class Element_, int WIDTH_, int BLOCK_KV_>
struct BackwardQueriesConfig {
  using Element = Element_;
  static constexpr int WIDTH = WIDTH_;        // of the tiles; head_dim and value_dim may be less
  static constexpr int BLOCK_KV = BLOCK_KV_;  // keys of a tile
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCK_Q = WARPS * 16;
  static constexpr int STAGES = 2;
  static constexpr bool IN_REGISTERS = WIDTH <= 64;

  using Tile = SharedTile<WIDTH>;
  static constexpr int ROWS_BYTES = Tile::bytes(BLOCK_Q);
  static constexpr int KV_BYTES = Tile::bytes(BLOCK_KV);
  static constexpr int STAGE_BYTES = 2 * KV_BYTES;
  static constexpr int shared_bytes(int /* branches */, int /* key_tiles */, int /* gradient_tiles */) {
    return 2 * ROWS_BYTES + STAGES * STAGE_BYTES;
  }
};

template <class Config>
struct BackwardQueries {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  using Cursor = KvCursor<Config::BLOCK_KV>;
  static constexpr int WIDTH = Config::WIDTH, BLOCK_KV = Config::BLOCK_KV;

  // Of an lse that the forward saved: f32 keeps 12 binary digits behind its point, of P as many as f16 has.
  static constexpr float LARGEST_LSE = 2048.0f;

  const BackwardParams& p;
  const ForwardParams& f;
  const QueryBlock block;
  const int row;  // first query of the warp
  const uint32_t sQ, sDout, sStages;

  RowsA<WIDTH, Config::IN_REGISTERS> q, dout;
  OnlineStatistics online;
  int finished;  // branches before this one have their statistics

  LaneStatistics statistics;
  float weight[ROWS_PER_LANE];
  PowerOfTwo factor[ROWS_PER_LANE];
  float rDq[WIDTH / 8][4];

  DEVICE BackwardQueries(const BackwardParams& p, const QueryBlock& block)
      : p(p),
        f(p.forward),
        block(block),
        row(block.first + warp_id() * 16),
        sQ(ptx::shared_address(ptx::dynamic_shared())),
        sDout(sQ + Config::ROWS_BYTES),
        sStages(sDout + Config::ROWS_BYTES),
        finished(0) {}

  DEVICE void run() {
    load_queries();
    if (saved_will_do()) {
      take_saved();
    } else {
      online.reset();
      sweep<true>();
      for (; finished < f.branches; finished++) store_none(finished);
    }
    if (p.dq.to == nullptr) return;
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) factor[r] = factor_of(f, block.b, block.h, row + fragment_row(2 * r));
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rDq[n][i] = 0.0f;
    }
    sweep<false>();
    const float scale[ROWS_PER_LANE] = {factor[0].up * f.softmax_scale, factor[1].up * f.softmax_scale};
    store_gradient<Element, WIDTH>(p.dq, {0, block.b, block.h, row, f.seq_q, 0, f.head_dim}, rDq, scale);
  }

 private:
  DEVICE uint32_t sK(int stage) const { return sStages + stage * Config::STAGE_BYTES; }
  DEVICE uint32_t sV(int stage) const { return sK(stage) + Config::KV_BYTES; }

  DEVICE void load_queries() {
    const uint16_t* gQ = static_cast<const uint16_t*>(f.q) + block.b * f.q_stride[0] + block.h * f.q_stride[2];
    const uint16_t* gDout = static_cast<const uint16_t*>(p.dout) + block.b * p.dout_stride[0] + block.h * p.dout_stride[2];
    load_rows<WIDTH, Config::BLOCK_Q, Config::THREADS>(sQ, gQ, f.q_stride[1], block.first, f.seq_q, f.head_dim,
                                                        threadIdx.x);
    load_rows<WIDTH, Config::BLOCK_Q, Config::THREADS>(sDout, gDout, p.dout_stride[1], block.first, f.seq_q, f.value_dim,
                                                        threadIdx.x);
  }

  DEVICE void load_tile(const Cursor& tile, int stage) {
    const SegmentParams& s = f.segment[tile.segment];
    const int head = block.h / s.group;
    const uint16_t* gK = static_cast<const uint16_t*>(s.k) + block.b * s.k_stride[0] + head * s.k_stride[2];
    const uint16_t* gV = static_cast<const uint16_t*>(s.v) + block.b * s.v_stride[0] + head * s.v_stride[2];
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sK(stage), gK, s.k_stride[1], tile.kv, tile.end, f.head_dim, threadIdx.x);
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sV(stage), gV, s.v_stride[1], tile.kv, tile.end, f.value_dim, threadIdx.x);
  }

  // All keys of all branches once: for the statistics, or, with those, for dq.
  template <bool STATISTICS>
  DEVICE void sweep() {
    Cursor tile;
    const BranchSet branches = STATISTICS ? BranchSet{p.branches, p.g_branches} : BranchSet{~0u, 0};
    tile.start(f, block, branches);
    if (!tile.done(f)) load_tile(tile, 0);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    // Written: Q, dout and the first stage, by every thread's copies, and the statistics of these queries, by one lane of
    // four. Read next: the tiles by every warp, the statistics by all four lanes.
    ptx::barrier_cta();
    q.load(sQ, warp_id() * 16);
    dout.load(sDout, warp_id() * 16);
    int branch = -1;
    for (int stage = 0; !tile.done(f); stage ^= 1) {
      Cursor next = tile;
      next.advance(f, block, branches);
      if (!next.done(f)) load_tile(next, stage ^ 1);
      ptx::cp_async_commit_group();
      if (!STATISTICS && branch != tile.branch) start_branch(tile);
      branch = tile.branch;
      attend<STATISTICS>(tile, stage);
      if (STATISTICS && next.branch != branch) finish_branch(branch);
      ptx::cp_async_wait_group<0>();
      // Written: the other stage, by every thread's copies; read next by every warp. Read: this stage, by every warp;
      // written next by the copies of the following iteration, or of the next sweep.
      ptx::barrier_cta();
      tile = next;
    }
  }

  template <bool STATISTICS>
  DEVICE void attend(const Cursor& tile, int stage) {
    float rS[BLOCK_KV / 8][4], rD[BLOCK_KV / 8][4];
    product_qk<Element, BLOCK_KV>(rS, q, sK(stage));
    product_qk<Element, BLOCK_KV>(rD, dout, sV(stage));
    const Mask mask{f.segment[tile.segment], block.b, block.h, f.seq_q, tile.key_len};
    mask.template cap<BLOCK_KV>(rS, f);
    if constexpr (!STATISTICS) {
      subtract_g<BLOCK_KV>(rD, statistics);
      multiply_slope<BLOCK_KV>(rD, rS, f);
    }
    mask.template admit<BLOCK_KV>(rS, row, tile.kv, tile.open(f, block));
    if constexpr (STATISTICS) {
      online.template step<BLOCK_KV>(rS, rD);
    } else {
      probabilities<BLOCK_KV>(rS, statistics);
      uint32_t rDs[BLOCK_KV / 8][2];
#pragma unroll
      for (int n = 0; n < BLOCK_KV / 8; n++) {
#pragma unroll
        for (int r = 0; r < ROWS_PER_LANE; r++) {
          rDs[n][r] = Element::pack(weight[r] * rS[n][2 * r] * rD[n][2 * r], weight[r] * rS[n][2 * r + 1] * rD[n][2 * r + 1]);
        }
      }
      product_pv<Element, WIDTH, BLOCK_KV>(rDq, rDs, sK(stage));
    }
  }

  DEVICE void start_branch(const Cursor& tile) {
    statistics.load(p, tile.branch, block.b, block.h, row);
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      weight[r] = tile.gate * region_of(f.branch[tile.branch], f, block.b, block.h, query) * factor[r].down;
    }
  }

  DEVICE void finish_branch(int branch) {
    for (; finished < branch; finished++) store_none(finished);
    finished++;
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      store_statistics(p, branch, block.b, block.h, row + fragment_row(2 * r), online.finish(r));
    }
    online.reset();
  }

  // For a branch without a key for any query of the block, or whose gate is 0.
  DEVICE void store_none(int branch) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      store_statistics(p, branch, block.b, block.h, row + fragment_row(2 * r), Statistics::none());
    }
  }

  // Whether out and lse of the forward replace the first sweep: the same answer for all threads of the block.
  DEVICE bool saved_will_do() const {
    if (f.out == nullptr || f.lse == nullptr || f.branches != 1 || p.g_branches != 0) return false;
    float largest = 0.0f;
    for (int i = lane_id(); i < Config::BLOCK_Q; i += WARP) {
      if (block.first + i >= f.seq_q) continue;
      const float lse = saved_lse(block.first + i);
      // Without any key it is -inf, which is exact.
      if (lse != NEGATIVE_INFINITY) largest = max_of(lse < 0.0f ? -lse : lse, largest);
      // NaN is passed on by the sweep.
      if (lse != lse) largest = LARGEST_F32;
    }
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2) largest = max_of(largest, ptx::shfl_bfly_f32(largest, mask));
    return largest < LARGEST_LSE;
  }

  DEVICE float saved_lse(int query) const {
    return f.lse[block.b * f.lse_stride[1] + block.h * f.lse_stride[2] + query * f.lse_stride[3]];
  }

  // Equation 12 for one branch: w g = dout · out.
  DEVICE void take_saved() {
    const uint16_t* gOut = static_cast<const uint16_t*>(f.out) + block.b * f.out_stride[0] + block.h * f.out_stride[2];
    const uint16_t* gDout = static_cast<const uint16_t*>(p.dout) + block.b * p.dout_stride[0] + block.h * p.dout_stride[2];
    const float gate = gate_of(f.branch[0], block.b, block.h);
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      float product = 0.0f;
      for (int column = lane_id() % 4 * 8; column < f.value_dim && query < f.seq_q; column += 32) {
        for (int d = column; d < column + 8; d++) {
          product += Element::widen(gOut[query * f.out_stride[1] + d]) * Element::widen(gDout[query * p.dout_stride[1] + d]);
        }
      }
      product = quad_sum(product);
      const float lse = query < f.seq_q ? saved_lse(query) : NEGATIVE_INFINITY;
      const float weight = gate * region_of(f.branch[0], f, block.b, block.h, query);
      Statistics row = Statistics::none();
      if (lse != NEGATIVE_INFINITY) row = {lse, 1.0f, weight == 0.0f ? 0.0f : product / weight};
      store_statistics(p, 0, block.b, block.h, query, row);
    }
  }
};

// One block: which queries, and the work.
template <class Config>
DEVICE void backward_queries(const BackwardParams& p) {
  const ForwardParams& f = p.forward;
  const int heads_before = blockIdx.x / f.head_blocks;
  const QueryBlock block{heads_before / f.heads, heads_before % f.heads,
                         int(blockIdx.x % f.head_blocks) * Config::BLOCK_Q, Config::BLOCK_Q};
  BackwardQueries<Config>(p, block).run();
}
