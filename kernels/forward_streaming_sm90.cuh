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
#include "params.h"
#include "tile/cursor.cuh"
#include "tile/load.cuh"
#include "tile/ring.cuh"
#include "tile/softmax.cuh"
#include "tile/store.cuh"
#include "tile/tile_mask.cuh"
#include "tile/warpgroup_product.cuh"

// Registers of a thread, given the registers of a multiprocessor: those the launch starts from are taken from the warpgroup
// that copies and given to those that multiply.
template <int CONSUMERS>
struct RegisterShare;
template <>
struct RegisterShare<2> {
  static constexpr int PRODUCER = 40, CONSUMER = 232;
};
template <>
struct RegisterShare<3> {
  static constexpr int PRODUCER = 32, CONSUMER = 160;
};

template <class Element_, int WIDTH_, int BLOCK_KV_, int CONSUMERS_, int STAGES_, bool BIASED_>
struct WarpgroupStreamingConfig {
  using Element = Element_;
  // Whether logits are more than products times a positive scale: capped, biased, or times another number.
  static constexpr bool BIASED = BIASED_;
  static constexpr int WIDTH = WIDTH_;          // of the tiles; head_dim and value_dim may be less
  static constexpr int BLOCK_KV = BLOCK_KV_;    // keys of a tile
  static constexpr int CONSUMERS = CONSUMERS_;  // warpgroups
  static constexpr int STAGES = STAGES_;
  static constexpr int WARPGROUP = 4 * WARP;
  static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
  static constexpr int BLOCK_Q = CONSUMERS * 64;

  using QTile = SwizzledTile<WIDTH, 64>;  // of a warpgroup
  using KvTile = SwizzledTile<WIDTH, BLOCK_KV>;
  static constexpr int STAGE_BYTES = 2 * KvTile::BYTES;
  static constexpr int Q_OFFSET = STAGES * STAGE_BYTES;
  static constexpr int BARRIER_OFFSET = Q_OFFSET + CONSUMERS * QTile::BYTES;
  static constexpr int BARRIER_BYTES = (1 + 4 * STAGES) * 8;
  // The sum of the branches, one f32 per accumulator register and thread; only for more than one branch.
  static constexpr int SUM_OFFSET = BARRIER_OFFSET + (BARRIER_BYTES + 15) / 16 * 16;
  static constexpr int SUM_BYTES = BLOCK_Q * WIDTH * 4;

  static constexpr int shared_bytes(int branches, int /* key_tiles */, int /* gradient_tiles */) {
    return SUM_OFFSET + (branches > 1 ? SUM_BYTES : 0);
  }
};

template <class Element, int WIDTH, int BLOCK_KV, int CONSUMERS, int STAGES>
using PlainConfig = WarpgroupStreamingConfig<Element, WIDTH, BLOCK_KV, CONSUMERS, STAGES, false>;

// What both roles know of a block.
template <class Config>
struct StreamingBlock {
  const MappedForwardParams& maps;
  const ForwardParams& p;
  const QueryBlock block;
  const uint32_t shared;

  DEVICE uint32_t sK(int stage) const { return shared + stage * Config::STAGE_BYTES; }
  DEVICE uint32_t sV(int stage) const { return sK(stage) + Config::KvTile::BYTES; }
  DEVICE uint32_t sQ(int group) const { return shared + Config::Q_OFFSET + group * Config::QTile::BYTES; }
  DEVICE uint32_t q_full() const { return shared + Config::BARRIER_OFFSET; }
  DEVICE uint32_t k_full(int stage) const { return q_full() + 8 + stage * 8; }
  DEVICE uint32_t v_full(int stage) const { return k_full(stage) + Config::STAGES * 8; }
  DEVICE uint32_t k_empty(int stage) const { return k_full(stage) + 2 * Config::STAGES * 8; }
  DEVICE uint32_t v_empty(int stage) const { return k_full(stage) + 3 * Config::STAGES * 8; }

  // By one thread. The others need a barrier.
  DEVICE void init_barriers() const {
    ptx::mbarrier_init(q_full(), 1);
    for (int stage = 0; stage < Config::STAGES; stage++) {
      ptx::mbarrier_init(k_full(stage), 1);
      ptx::mbarrier_init(v_full(stage), 1);
      ptx::mbarrier_init(k_empty(stage), Config::CONSUMERS * 4);
      ptx::mbarrier_init(v_empty(stage), Config::CONSUMERS * 4);
    }
    ptx::fence_mbarrier_init();
  }
  // Both roles go through the same tiles.
  DEVICE void start(KvCursor<Config::BLOCK_KV>& tile) const {
    tile.closed_too = p.lse != nullptr ? ~0u : 0u;
    tile.start(p, block);
  }
};

// The warp that copies.
template <class Config>
struct StreamingProducer : StreamingBlock<Config> {
  using Base = StreamingBlock<Config>;
  using Base::block;
  using Base::maps;
  using Base::p;
  using KvTile = typename Config::KvTile;

  DEVICE explicit StreamingProducer(const Base& base) : Base(base) {}

  DEVICE void run() const {
    const bool elected = ptx::elect_sync();
    if (elected) load_q();
    KvCursor<Config::BLOCK_KV> tile;
    RingPosition<Config::STAGES> at;
    for (this->start(tile); !tile.done(p); tile.advance(p, block), at.advance()) {
      const SegmentParams& s = p.segment[tile.segment];
      const int head = block.h / s.group;
      // The stage has been read; the first time around nothing was there.
      wait_for_phase(this->k_empty(at.stage), at.parity ^ 1);
      if (elected) load(this->sK(at.stage), maps.k[tile.segment], this->k_full(at.stage), s.k_stride, tile.kv, head);
      wait_for_phase(this->v_empty(at.stage), at.parity ^ 1);
      if (tile.key_len < s.seq_kv && tile.kv + Config::BLOCK_KV > tile.key_len) {
        load_ragged_v(s, head, tile, at.stage);
      } else if (elected) {
        load(this->sV(at.stage), maps.v[tile.segment], this->v_full(at.stage), s.v_stride, tile.kv, head);
      }
    }
  }

 private:
  // Broadcast along a dimension, a tensor has one index there.
  static DEVICE int index(int64_t stride, int i) { return stride == 0 ? 0 : i; }

  DEVICE void load_q() const {
    ptx::mbarrier_arrive_expect_tx(this->q_full(), Config::CONSUMERS * Config::QTile::BYTES);
    for (int group = 0; group < Config::CONSUMERS; group++) {
      for (int n = 0; n < Config::QTile::BLOCKS; n++) {
        ptx::cp_async_bulk_tensor_4d(this->sQ(group) + n * Config::QTile::BLOCK_BYTES, &maps.q, this->q_full(),
                                     n * Config::QTile::COLUMNS, block.first + group * 64,
                                     index(p.q_stride[2], block.h), index(p.q_stride[0], block.b));
      }
    }
  }

  DEVICE void load(uint32_t sTile, const ptx::TensorMap& map, uint32_t full, const int64_t (&stride)[3], int kv,
                   int head) const {
    ptx::mbarrier_arrive_expect_tx(full, KvTile::BYTES);
#pragma unroll 1
    for (int n = 0; n < KvTile::BLOCKS; n++) {
      ptx::cp_async_bulk_tensor_4d(sTile + n * KvTile::BLOCK_BYTES, &map, full, n * KvTile::COLUMNS, kv,
                                   index(stride[2], head), index(stride[0], block.b));
    }
  }

  // A tile of values of which key_len leaves a part. What lies behind may be anything, and 0 times a NaN is one: it is
  // replaced by zeros, which a bulk copy cannot do. All lanes copy, at most once in a segment.
  DEVICE void load_ragged_v(const SegmentParams& s, int head, const KvCursor<Config::BLOCK_KV>& tile, int stage) const {
    constexpr int ROWS = 8;
    const uint16_t* gV = static_cast<const uint16_t*>(s.v) + block.b * s.v_stride[0] + head * s.v_stride[2];
#pragma unroll 1
    for (int row = 0; row < Config::BLOCK_KV; row += ROWS) {
      load_rows<Config::WIDTH, ROWS, WARP, KvTile>(this->sV(stage) + row * KvTile::PITCH_BYTES, gV, s.v_stride[1],
                                                   tile.kv + row, tile.key_len, p.value_dim, lane_id());
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    // Written: the tile, by the copies of every lane. Read next by wgmma, after a phase that one lane completes.
    ptx::fence_proxy_async_shared_cta();
    ptx::bar_warp_sync();
    if (lane_id() == 0) ptx::mbarrier_arrive(this->v_full(stage));
  }
};

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
    out.template store<Element, WIDTH, typename Config::QTile>(rO, rows);
  }

 private:
  // First query of the warp. Asked for each time: a register for it is one too many at a width of 256.
  DEVICE int row() const { return block.first + group * 64 + warp_id() % 4 * 16; }

  // All tiles of a branch, from its first one on; leaves `tile` at the first one of the next.
  DEVICE void attend_branch(Cursor& tile, RingPosition<Config::STAGES>& at) {
    enter_segment(tile);
    start_qk(at.stage, at.parity);
    ptx::wgmma_wait_group<0>();
    release(this->k_empty(at.stage));
    exponentials(tile);
    pack_probabilities<Element, BLOCK_KV>(rP, rS);
    Cursor next = tile;
    RingPosition<Config::STAGES> ahead = at;
    for (;;) {
      const bool entered = next.advance(p, block);
      ahead.advance();
      if (next.branch != tile.branch) break;
      if (entered) enter_segment(next);
      start_qk(ahead.stage, ahead.parity);
      start_pv(at.stage, at.parity);
      ptx::wgmma_wait_group<1>();
      release(this->k_empty(ahead.stage));
      exponentials(next);
      ptx::wgmma_wait_group<0>();
      release(this->v_empty(at.stage));
      rescale();
      pack_probabilities<Element, BLOCK_KV>(rP, rS);
      at = ahead;
    }
    start_pv(at.stage, at.parity);
    ptx::wgmma_wait_group<0>();
    release(this->v_empty(at.stage));
    finish_branch(tile);
    tile = next;
    at = ahead;
  }

  DEVICE void enter_segment(const Cursor& tile) {
    const SegmentParams& s = p.segment[tile.segment];
    open = keys_of_all_rows(s, p.seq_q, block.first, Config::BLOCK_Q, key_len_of(s, block.b));
  }

  DEVICE void start_qk(int stage, uint32_t parity) {
    // Written: keys, by bulk copies.
    wait_for_phase(this->k_full(stage), parity);
    ptx::wgmma_fence();
    issue_qk<Element, WIDTH, BLOCK_KV>(rS, this->sQ(group), this->sK(stage));
    ptx::wgmma_commit_group();
  }

  DEVICE void start_pv(int stage, uint32_t parity) {
    // Written: values, by bulk copies, or by the producer's lanes.
    wait_for_phase(this->v_full(stage), parity);
    ptx::wgmma_fence();
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
    if (tile.kv < open.begin || tile.kv + BLOCK_KV > open.end) {
      mask_tile<BLOCK_KV>(rS, s, p.seq_q, row(), tile.kv, key_len_of(s, block.b));
    }
    if constexpr (Config::BIASED) add_bias<BLOCK_KV>(rS, s, block.b, block.h, row(), tile.kv);
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
