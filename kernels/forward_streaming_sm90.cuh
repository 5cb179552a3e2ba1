// Forward attention over any number of branches on sm_90a: one warp copies, two or three warpgroups multiply.
//
//   out_i = Σ_b (w_bi / l_bi) Σ_j exp(S_ij - m_bi) v_j        docs/math.md, equations 1 to 7
//
// One block computes CONSUMERS · 64 queries of one head. Its first warpgroup brings tiles of keys and values into a ring of
// STAGES stages by bulk copies (TMA); each other warpgroup has 64 queries and sees all keys.
//
//   copies     K0 V0 K1 V1 | K2 V2 …      as stages become free
//   products   QK0   QK1 PV0   QK2 PV1   QK3 PV2  …  PVn      issued, and running by themselves
//   softmax        S0       S1        S2                      while the other product of the pair runs
//
// S and P live in registers, 64 x BLOCK_KV of a warpgroup; O accumulates in registers, 64 x WIDTH, f32. At the end of a
// branch O is weighed into the sum of the branches, in shared memory. Q is read once, out written once.
// Precision: products in f32, softmax, gates, regions and the sum of branches in f32; P is rounded to the element type for the
// second product, out once at the store.
// The host guarantees: head_dim and value_dim are multiples of 8 and at most WIDTH, rows of q, k, v and out start at
// multiples of 16 bytes, at most MAX_BRANCHES branches and MAX_MAPPED_SEGMENTS segments, maps for those that have keys.
#pragma once
#include "tile/softmax.cuh"
#include "tile/store.cuh"
#include "tile/streaming_producer.cuh"
#include "tile/tile_mask.cuh"
#include "tile/warpgroup_product.cuh"

template <class Element, int WIDTH, int BLOCK_KV, int CONSUMERS, int STAGES>
using PlainConfig = WarpgroupStreamingConfig<Element, WIDTH, BLOCK_KV, CONSUMERS, STAGES, false>;

// A warpgroup that multiplies. `group` counts them from 0.
template <class Config>
struct StreamingConsumer : StreamingBlock<Config> {
  using Base = StreamingBlock<Config>;
  using Base::block;
  using Base::p;
  using Element = typename Config::Element;
  using Cursor = KvCursor<Config::BLOCK_KV>;
  static constexpr int WIDTH = Config::WIDTH, BLOCK_KV = Config::BLOCK_KV;
  static constexpr int TILES = WIDTH / 8;

  const int group;

  float rO[TILES][4];
  float rS[BLOCK_KV / 8][4];
  uint32_t rP[BLOCK_KV / 16][4];
  OnlineSoftmax softmax;
  float correction[ROWS_PER_LANE];
  KeyRange open;        // keys of the segment that every query of the block may attend to
  int finished = 0;     // branches before this one are dealt with
  bool summed = false;  // the sum of the branches holds something

  DEVICE StreamingConsumer(const Base& base, int group) : Base(base), group(group) {}

  DEVICE void run() {
    Cursor tile;
    RingPosition<Config::STAGES> at;
    start_branch();
    this->start(tile);
    // Written: Q, by bulk copies.
    wait_for_phase(this->q_full(), 0);
    while (!tile.done(p)) attend_branch(tile, at);
    for (; finished < p.branches; finished++) store_lse_of_empty(finished);
    if (p.branches > 1) take_sum();
    // Each warp stages its own rows where its queries were: the last wait for a product was behind their last use.
    const OutRows out{p, block.b, block.h, row()};
    char* const rows = ptx::dynamic_shared() + Config::Q_OFFSET + group * Config::QTile::BYTES +
                       warp_id() % 4 * 16 * Config::QTile::PITCH_BYTES;
    if (p.accumulate != 0) out.template add_held<Element, WIDTH>(rO);
    out.template store<Element, WIDTH, typename Config::QTile>(rO, rows, false);
  }

 private:
  // First query of the warp. Asked for each time: a register for it is one too many at a width of 256.
  DEVICE int row() const { return block.first + group * 64 + warp_id() % 4 * 16; }

  // All tiles of a branch, from its first one on; leaves `tile` at the first one of the next.
  DEVICE void attend_branch(Cursor& tile, RingPosition<Config::STAGES>& at) {
    enter_segment(tile);
    wait_for_phase(this->k_full(at.stage), at.parity);
    ptx::wgmma_fence();
    start_qk(at.stage);
    ptx::wgmma_wait_group<0>();
    release(this->k_empty(at.stage));
    exponentials(tile);
    pack_probabilities<Element, BLOCK_KV>(rP, rS);
    Cursor next = tile;
    RingPosition<Config::STAGES> ahead = at;
    for (;;) {
      const bool entered = next.advance(p, block, BranchSet::of(p));
      ahead.advance();
      if (next.branch != tile.branch) break;
      if (entered) enter_segment(next);
      // Written: keys and values, by bulk copies; the values came first. Values of a segment's end may also be the producer's
      // lanes'.
      wait_for_phase(this->k_full(ahead.stage), ahead.parity);
      wait_for_phase(this->v_full(at.stage), at.parity);
      // Written: rP and rO. Used next: by both products.
      ptx::wgmma_fence();
      start_qk(ahead.stage);
      start_pv(at.stage);
      ptx::wgmma_wait_group<1>();
      release(this->k_empty(ahead.stage));
      exponentials(next);
      ptx::wgmma_wait_group<0>();
      release(this->v_empty(at.stage));
      rescale();
      pack_probabilities<Element, BLOCK_KV>(rP, rS);
      at = ahead;
    }
    wait_for_phase(this->v_full(at.stage), at.parity);
    // Written: rP and rO. Used next: by the last product.
    ptx::wgmma_fence();
    start_pv(at.stage);
    ptx::wgmma_wait_group<0>();
    release(this->v_empty(at.stage));
    finish_branch(tile);
    tile = next;
    at = ahead;
  }

  DEVICE void enter_segment(const Cursor& tile) {
    const SegmentParams& s = p.segment[tile.segment];
    open = keys_of_all_rows(s, p.seq_q, block.first, Config::BLOCK_Q, key_len_of(s, block.b));
    // Queries past the last have no bias that could be read: none of their keys counts as open.
    if (Config::BIASED && block.first + Config::BLOCK_Q > p.seq_q) open.end = 0;
  }

  DEVICE void start_qk(int stage) {
    issue_qk<Element, WIDTH, BLOCK_KV>(rS, this->sQ(group), this->sK(stage));
    ptx::wgmma_commit_group();
  }

  DEVICE void start_pv(int stage) {
    issue_pv<Element, WIDTH, BLOCK_KV>(rO, rP, this->sV(stage));
    ptx::wgmma_commit_group();
  }

  // The warp is done with what the barrier guards: its products have been waited for by all lanes together.
  DEVICE void release(uint32_t empty) const {
    if (lane_id() == 0) ptx::mbarrier_arrive(empty);
  }

  // rS: products -> exponentials.
  DEVICE void exponentials(const Cursor& tile) {
    const SegmentParams& s = p.segment[tile.segment];
    if constexpr (Config::BIASED) cap_tile<BLOCK_KV>(rS, p);
    const bool all = tile.kv >= open.begin && tile.kv + BLOCK_KV <= open.end;
    if (!all) mask_tile<BLOCK_KV>(rS, s, p.seq_q, row(), tile.kv, key_len_of(s, block.b));
    if constexpr (Config::BIASED) add_bias<BLOCK_KV>(rS, s, block.b, block.h, row(), tile.kv, all);
    softmax.template exponentials<BLOCK_KV>(rS, Config::BIASED ? 1.0f : p.softmax_scale, Config::BIASED, correction);
  }

  DEVICE void start_branch() {
    softmax.reset();
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] = 0.0f;
    }
  }

  DEVICE void rescale() {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] *= correction[i / 2];
    }
  }

  DEVICE float& sum_at(int n, int i) const {
    auto* sSum = reinterpret_cast<float*>(ptx::dynamic_shared() + Config::SUM_OFFSET);
    return sSum[(n * 4 + i) * (Config::BLOCK_Q * 2) + threadIdx.x - Config::WARPGROUP];
  }

  // Weighs rO into the sum of the branches (equation 7) and writes lse.
  DEVICE void finish_branch(const Cursor& tile) {
    for (; finished < tile.branch; finished++) store_lse_of_empty(finished);
    finished++;
    const BranchParams& branch = p.branch[tile.branch];
    const float gate = gate_of(branch, block.b, block.h);
    float weight[ROWS_PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row() + fragment_row(2 * r);
      const float total = quad_sum(softmax.sum[r]);
      store_lse(p, tile.branch, block.b, block.h, query, lse_of(softmax.max[r], total));
      weight[r] = total == 0.0f ? 0.0f : gate * region_of(branch, p, block.b, block.h, query) / total;
    }
    // A closed gate got here for its lse alone: not even NaN may pass it.
    const bool closed = gate == 0.0f;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        rO[n][i] = closed ? 0.0f : rO[n][i] * weight[i / 2];
        if (p.branches > 1 && !closed) sum_at(n, i) = summed ? sum_at(n, i) + rO[n][i] : rO[n][i];
      }
    }
    summed = summed || !closed;
    if (p.branches > 1) start_branch();
  }

  // The sum of the branches, back into rO. Every thread reads what it wrote itself.
  DEVICE void take_sum() {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] = summed ? sum_at(n, i) : 0.0f;
    }
  }

  // For a branch without a key for any query of the block.
  DEVICE void store_lse_of_empty(int branch) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) store_lse(p, branch, block.b, block.h, row() + fragment_row(2 * r), NEGATIVE_INFINITY);
  }
};

// One block: which queries, and the work.
template <class Config>
DEVICE void forward_streaming(const MappedForwardParams& maps) {
  const ForwardParams& p = maps.forward;
  const int heads_before = blockIdx.x / p.head_blocks;
  const QueryBlock queries{heads_before / p.heads, heads_before % p.heads,
                           int(blockIdx.x % p.head_blocks) * Config::BLOCK_Q, Config::BLOCK_Q};
  const StreamingBlock<Config> block{maps, p, queries, ptx::shared_address(ptx::dynamic_shared())};
  if (threadIdx.x == 0) block.init_barriers();
  // Written: the mbarriers. Read next: by everyone.
  ptx::barrier_cta();
  if (warp_id() < 4) {
    ptx::setmaxnreg_dec<RegisterShare<Config::CONSUMERS>::PRODUCER>();
    if (warp_id() == 0) StreamingProducer<Config>(block).run();
  } else {
    ptx::setmaxnreg_inc<RegisterShare<Config::CONSUMERS>::CONSUMER>();
    // The same for the whole warp, which the compiler could not know otherwise.
    const int warpgroup = int(ptx::shfl_idx_b32(uint32_t(warp_id() / 4), 0));
    StreamingConsumer<Config>(block, warpgroup - 1).run();
  }
}
