// The half of the streaming kernel for sm_90a that copies, and what both halves know: constants, and where things lie in shared
// memory.
//
//   stage 0: K V | stage 1: K V | … | Q of each warpgroup | mbarriers | the sum of the branches
#pragma once
#include "cursor.cuh"
#include "load.cuh"
#include "register_share.cuh"
#include "ring.cuh"
#include "swizzled_tile.cuh"

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
    tile.start(p, block, BranchSet::of(p));
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
    for (this->start(tile); !tile.done(p); tile.advance(p, block, BranchSet::of(p)), at.advance()) {
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
  DEVICE void load_q() const {
    ptx::mbarrier_arrive_expect_tx(this->q_full(), Config::CONSUMERS * Config::QTile::BYTES);
    for (int group = 0; group < Config::CONSUMERS; group++) {
      for (int n = 0; n < Config::QTile::BLOCKS; n++) {
        ptx::cp_async_bulk_tensor_4d(this->sQ(group) + n * Config::QTile::BLOCK_BYTES, &maps.q, this->q_full(),
                                     n * Config::QTile::COLUMNS, block.first + group * 64,
                                     map_index(p.q_stride[2], block.h), map_index(p.q_stride[0], block.b));
      }
    }
  }

  DEVICE void load(uint32_t sTile, const ptx::TensorMap& map, uint32_t full, const int64_t (&stride)[3], int kv,
                   int head) const {
    ptx::mbarrier_arrive_expect_tx(full, KvTile::BYTES);
#pragma unroll 1
    for (int n = 0; n < KvTile::BLOCKS; n++) {
      ptx::cp_async_bulk_tensor_4d(sTile + n * KvTile::BLOCK_BYTES, &map, full, n * KvTile::COLUMNS, kv,
                                   map_index(stride[2], head), map_index(stride[0], block.b));
    }
  }

  // A tile of values of which key_len leaves a part. What lies behind may be anything, and 0 times a NaN is one: it is
  // replaced by zeros, which a bulk copy cannot do. All lanes copy, at most once in a segment.
  DEVICE void load_ragged_v(const SegmentParams& s, int head, const KvCursor<Config::BLOCK_KV>& tile, int stage) const {
    constexpr int ROWS = 8, COLUMNS = KvTile::COLUMNS;
    const uint16_t* gV = static_cast<const uint16_t*>(s.v) + block.b * s.v_stride[0] + head * s.v_stride[2];
    // A block of columns at a time, and few rows: the warp has few registers.
#pragma unroll 1
    for (int n = 0; n < KvTile::BLOCKS; n++) {
#pragma unroll 1
      for (int row = 0; row < Config::BLOCK_KV; row += ROWS) {
        const uint32_t sRows = this->sV(stage) + n * KvTile::BLOCK_BYTES + row * KvTile::PITCH_BYTES;
        load_rows<COLUMNS, ROWS, WARP, SwizzledTile<COLUMNS, Config::BLOCK_KV>>(
            sRows, gV + n * COLUMNS, s.v_stride[1], tile.kv + row, tile.key_len, p.value_dim - n * COLUMNS, lane_id());
      }
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async_shared_cta();
    // Written: the tile, by the copies of every lane. Read next: by wgmma, after the phase that one lane completes.
    ptx::bar_warp_sync();
    if (lane_id() == 0) ptx::mbarrier_arrive(this->v_full(stage));
  }
};
