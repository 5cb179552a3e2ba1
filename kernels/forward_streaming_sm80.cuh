// Forward attention over any number of branches, keys and values streamed through shared memory.
//
//   out_i = Σ_b (w_bi / l_bi) Σ_j exp(S_ij - m_bi) v_j        docs/math.md, equations 1 to 7
//
// One block computes 64 queries of one head; each of its four warps has 16 of them and sees all keys.
//
//        keys →   tile 0   tile 1   …  | next segment or branch …
//   warp 0  16 q  [S P]    [S P]          S and P live in registers, 16 x BLOCK_KV
//   warp 1  16 q  [S P]    [S P]          O accumulates in registers, 16 x WIDTH, f32
//   warp 2  …                             at the end of a branch O is weighed into the sum of the branches
//   warp 3  …
//
// Tiles of K and V pass through a ring of two stages, one being filled (cp.async) while the other is used. Q is read
// once, out written once.
// Precision: products in f32, softmax, gates, regions and the sum of branches in f32; P is rounded to the element type for the
// second product, out once at the store.
// The host guarantees: head_dim and value_dim are multiples of 8 and at most WIDTH, rows of q, k, v and out start at
// multiples of 16 bytes, at most MAX_BRANCHES branches and MAX_SEGMENTS segments.
#pragma once
#include "params.h"
#include "tile/cursor.cuh"
#include "tile/load.cuh"
#include "tile/product.cuh"
#include "tile/softmax.cuh"
#include "tile/store.cuh"

template <class Element_, int WIDTH_, int BLOCK_KV_>
struct StreamingConfig {
  using Element = Element_;
  static constexpr int WIDTH = WIDTH_;        // of the tiles; head_dim and value_dim may be less
  static constexpr int BLOCK_KV = BLOCK_KV_;  // keys of a tile
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCK_Q = WARPS * 16;
  static constexpr int STAGES = 2;

  using Tile = SharedTile<WIDTH>;
  static constexpr int Q_BYTES = Tile::bytes(BLOCK_Q);
  static constexpr int KV_BYTES = Tile::bytes(BLOCK_KV);
  static constexpr int STAGE_BYTES = 2 * KV_BYTES;
  // The sum of the branches, one f32 per accumulator register and thread; only for more than one branch.
  static constexpr int SUM_BYTES = BLOCK_Q * WIDTH * 4;
  // Up to a width of 160 Q moves to registers, and the sum takes its place in shared memory.
  static constexpr bool Q_IN_REGISTERS = WIDTH <= 160;
  static constexpr int SUM_OFFSET = STAGES * STAGE_BYTES + (Q_IN_REGISTERS ? 0 : Q_BYTES);

  static constexpr int shared_bytes(int branches, int /* key_tiles */, int /* gradient_tiles */) {
    const int without = STAGES * STAGE_BYTES + Q_BYTES, with = SUM_OFFSET + SUM_BYTES;
    return branches > 1 && with > without ? with : without;
  }
  static_assert(Q_BYTES <= STAGES * STAGE_BYTES, "out is staged through the ring");
};

template <class Config>
struct ForwardStreaming {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  using Cursor = KvCursor<Config::BLOCK_KV>;
  static constexpr int WIDTH = Config::WIDTH, BLOCK_KV = Config::BLOCK_KV;
  static constexpr int ACCUMULATORS = WIDTH / 8;

  const ForwardParams& p;
  const QueryBlock block;
  const int row;  // first query of the warp
  char* const shared;
  const uint32_t sStages, sQ;
  float* const sSum;

  RowsA<WIDTH, Config::Q_IN_REGISTERS> q;
  float rO[ACCUMULATORS][4];
  OnlineSoftmax softmax;
  int finished;  // branches before this one are dealt with
  bool summed;   // the sum of the branches holds something

  DEVICE ForwardStreaming(const ForwardParams& p, const QueryBlock& block)
      : p(p),
        block(block),
        row(block.first + warp_id() * 16),
        shared(ptx::dynamic_shared()),
        sStages(ptx::shared_address(shared)),
        sQ(sStages + Config::STAGES * Config::STAGE_BYTES),
        sSum(reinterpret_cast<float*>(shared + Config::SUM_OFFSET)),
        finished(0),
        summed(false) {
    start_branch();
  }

  DEVICE void run() {
    const uint16_t* gQ = static_cast<const uint16_t*>(p.q) + block.b * p.q_stride[0] + block.h * p.q_stride[2];
    load_rows<WIDTH, Config::BLOCK_Q, Config::THREADS>(sQ, gQ, p.q_stride[1], block.first, p.seq_q, p.head_dim,
                                                        threadIdx.x);
    Cursor tile;
    tile.start(p, block, BranchSet::of(p));
    if (!tile.done(p)) load_tile(tile, 0);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    // Written: Q and the first stage, by every thread's copies. Read next: by every warp.
    ptx::barrier_cta();
    q.load(sQ, warp_id() * 16);
    // Read: Q, by every warp. Written next: the sum of the branches, in its place.
    if (Config::Q_IN_REGISTERS && p.branches > 1) ptx::barrier_cta();

    for (int stage = 0; !tile.done(p); stage ^= 1) {
      Cursor next = tile;
      next.advance(p, block, BranchSet::of(p));
      if (!next.done(p)) load_tile(next, stage ^ 1);
      ptx::cp_async_commit_group();
      attend(tile, stage);
      if (next.branch != tile.branch) finish_branch(tile);
      ptx::cp_async_wait_group<0>();
      // Written: the other stage, by every thread's copies; read next by every warp. Read: this stage, by every warp;
      // written next by the copies of the following iteration, or by the staging of out.
      ptx::barrier_cta();
      tile = next;
    }
    for (; finished < p.branches; finished++) store_lse_of_empty(finished);
    if (p.branches > 1) take_sum();
    // The ring is free: every warp has passed the last barrier. Each stages its own rows.
    const OutRows out{p, block.b, block.h, row};
    out.store<Element, WIDTH>(rO, shared + warp_id() * (16 * Tile::PITCH_BYTES), p.accumulate != 0);
  }

 private:
  DEVICE void start_branch() {
    softmax.reset();
#pragma unroll
    for (int n = 0; n < ACCUMULATORS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] = 0.0f;
    }
  }

  DEVICE uint32_t sK(int stage) const { return sStages + stage * Config::STAGE_BYTES; }
  DEVICE uint32_t sV(int stage) const { return sK(stage) + Config::KV_BYTES; }

  DEVICE void load_tile(const Cursor& tile, int stage) {
    const SegmentParams& s = p.segment[tile.segment];
    const int head = block.h / s.group;
    const uint16_t* gK = static_cast<const uint16_t*>(s.k) + block.b * s.k_stride[0] + head * s.k_stride[2];
    const uint16_t* gV = static_cast<const uint16_t*>(s.v) + block.b * s.v_stride[0] + head * s.v_stride[2];
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sK(stage), gK, s.k_stride[1], tile.kv, tile.end, p.head_dim,
                                                  threadIdx.x);
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sV(stage), gV, s.v_stride[1], tile.kv, tile.end, p.value_dim,
                                                  threadIdx.x);
  }

  // One tile of keys: logits, one step of the softmax, rO += P V.
  DEVICE void attend(const Cursor& tile, int stage) {
    float rS[BLOCK_KV / 8][4];
    product_qk<Element, BLOCK_KV>(rS, q, sK(stage));
    const Mask mask{p.segment[tile.segment], block.b, block.h, p.seq_q, tile.key_len};
    mask.cap<BLOCK_KV>(rS, p);
    mask.admit<BLOCK_KV>(rS, row, tile.kv, tile.open(p, block));
    uint32_t rP[BLOCK_KV / 8][2];
    softmax.step<Element, WIDTH, BLOCK_KV>(rS, rP, rO);
    product_pv<Element, WIDTH, BLOCK_KV>(rO, rP, sV(stage));
  }

  // Weighs rO into the sum of the branches (equation 7) and writes lse.
  DEVICE void finish_branch(const Cursor& tile) {
    for (; finished < tile.branch; finished++) store_lse_of_empty(finished);
    finished++;
    const BranchParams& branch = p.branch[tile.branch];
    float weight[ROWS_PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      const float total = quad_sum(softmax.sum[r]);
      store_lse(p, tile.branch, block.b, block.h, query, lse_of(softmax.max[r], total));
      weight[r] = total == 0.0f ? 0.0f : tile.gate * region_of(branch, p, block.b, block.h, query) / total;
    }
    // A closed gate got here for its lse alone: not even NaN may pass it.
    const bool closed = tile.gate == 0.0f;
#pragma unroll
    for (int n = 0; n < ACCUMULATORS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        rO[n][i] = closed ? 0.0f : rO[n][i] * weight[i / 2];
        if (p.branches > 1 && !closed) {
          float& sum = sSum[(n * 4 + i) * Config::THREADS + threadIdx.x];
          sum = summed ? sum + rO[n][i] : rO[n][i];
        }
      }
    }
    summed = summed || !closed;
    if (p.branches > 1) start_branch();
  }

  // The sum of the branches, back into rO. Every thread reads what it wrote itself.
  DEVICE void take_sum() {
#pragma unroll
    for (int n = 0; n < ACCUMULATORS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] = summed ? sSum[(n * 4 + i) * Config::THREADS + threadIdx.x] : 0.0f;
    }
  }

  // For a branch without a key for any query of the block.
  DEVICE void store_lse_of_empty(int branch) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) store_lse(p, branch, block.b, block.h, row + fragment_row(2 * r), NEGATIVE_INFINITY);
  }
};

// One block: which queries, and the work.
template <class Config>
DEVICE void forward_streaming(const ForwardParams& p) {
  const int heads_before = blockIdx.x / p.head_blocks;
  const QueryBlock block{heads_before / p.heads, heads_before % p.heads,
                         int(blockIdx.x % p.head_blocks) * Config::BLOCK_Q, Config::BLOCK_Q};
  ForwardStreaming<Config>(p, block).run();
}
