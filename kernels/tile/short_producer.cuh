// The half of the short kernel for sm_90a that copies, and what both halves know: constants, and where things lie in shared
// memory.
//
//   ring of Q tiles | K of all branches | V likewise | mbarriers | keys of each tile | gate of each branch
//
// Keys and values lie in tiles of 16 rows, one segment after the other, each padded to whole tiles: all tiles of 64 columns, then
// those of the next 64. So any ROW_KEYS of them that follow each other are one operand.
#pragma once
#include "branch.cuh"
#include "load.cuh"
#include "mask.cuh"
#include "register_share.cuh"
#include "ring.cuh"
#include "swizzled_tile.cuh"

template <class Element_, int WIDTH_, int ROW_KEYS_, int CONSUMERS_, int STAGES_>
struct WarpgroupShortConfig {
  using Element = Element_;
  static constexpr int WIDTH = WIDTH_;          // of the tiles; head_dim and value_dim may be less
  static constexpr int ROW_KEYS = ROW_KEYS_;    // of one product, padded; no branch has more
  static constexpr int FEW_KEYS = 112;          // of a narrower product, where branches leave it at that
  static constexpr int BLOCK_KV = ROW_KEYS;
  static constexpr int CONSUMERS = CONSUMERS_;  // warpgroups
  static constexpr int STAGES = STAGES_;        // of Q
  static constexpr int THREADS = (1 + CONSUMERS) * 4 * WARP;
  static constexpr int BLOCK_Q = 64;            // of a warpgroup
  static constexpr int WINDOW = ROW_KEYS / 16;  // tiles of one product

  using QTile = SwizzledTile<WIDTH, BLOCK_Q>;
  static constexpr int BLOCKS = QTile::BLOCKS;
  static constexpr int TILE_BYTES = 16 * QTile::PITCH_BYTES;  // 16 keys, 64 columns
  static constexpr int KEYS_OFFSET = STAGES * QTile::BYTES;
  static constexpr int BARRIER_BYTES = (2 + 2 * STAGES) * 8;
  static constexpr int MAX_TILES = 64;
  static constexpr int REST_BYTES = (BARRIER_BYTES + 15) / 16 * 16 + MAX_TILES * 4 + MAX_BRANCHES * 4;
  static constexpr int MOST_SHARED_BYTES = 227 << 10;
  static_assert(ROW_KEYS % 16 == 0, "keys are taken 16 at a time");
  static_assert(MAX_TILES * 2 * BLOCKS * TILE_BYTES > MOST_SHARED_BYTES, "shared memory ends before the table does");

  // `key_tiles` is the sum over all segments of seq_kv / 16, rounded up. A product reads whole windows.
  static constexpr int shared_bytes(int /* branches */, int key_tiles, int /* gradient_tiles */) {
    return KEYS_OFFSET + 2 * (key_tiles > WINDOW ? key_tiles : WINDOW) * BLOCKS * TILE_BYTES + REST_BYTES;
  }
};

DEVICE int key_tiles_of(const SegmentParams& segment) { return (segment.seq_kv + 15) / 16; }

// Of all segments of a branch.
DEVICE int key_tiles_of(const ForwardParams& p, int branch) {
  int tiles = 0;
  for (int s = p.branch[branch].first_segment; s < p.branch[branch].end_segment; s++) tiles += key_tiles_of(p.segment[s]);
  return tiles;
}

// What both roles know of a block: `slot` of the blocks of a head, whose n-th tile of queries is slot + n · head_blocks.
template <class Config>
struct ShortBlock {
  const MappedForwardParams& maps;
  const ForwardParams& p;
  const int b, h, slot;
  const uint32_t shared;
  const int key_tiles;  // with those that a product may read beyond the last

  DEVICE ShortBlock(const MappedForwardParams& maps, int b, int h, int slot)
      : maps(maps),
        p(maps.forward),
        b(b),
        h(h),
        slot(slot),
        shared(ptx::shared_address(ptx::dynamic_shared())),
        key_tiles(max_of(tiles_before(p, p.branches), Config::WINDOW)) {}

  DEVICE uint32_t sQ(int stage) const { return shared + stage * Config::QTile::BYTES; }
  // From a tile on; the next 64 columns are block_bytes() further.
  DEVICE uint32_t sK(int tile) const { return shared + Config::KEYS_OFFSET + tile * Config::TILE_BYTES; }
  DEVICE uint32_t sV(int tile) const { return sK(tile) + Config::BLOCKS * block_bytes(); }
  DEVICE int block_bytes() const { return key_tiles * Config::TILE_BYTES; }

  DEVICE uint32_t k_full() const { return sV(0) + Config::BLOCKS * block_bytes(); }
  DEVICE uint32_t v_full() const { return k_full() + 8; }
  DEVICE uint32_t q_full(int stage) const { return v_full() + 8 + stage * 8; }
  DEVICE uint32_t q_empty(int stage) const { return q_full(stage) + Config::STAGES * 8; }

  // Keys of a tile that may be attended to, and gates.
  DEVICE int& keys_in(int tile) const { return reinterpret_cast<int*>(tables())[tile]; }
  DEVICE float& gate(int branch) const { return reinterpret_cast<float*>(tables())[Config::MAX_TILES + branch]; }

  // By all threads. They need a barrier.
  DEVICE void prepare() const {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(k_full(), 1);
      ptx::mbarrier_init(v_full(), 2);
      for (int stage = 0; stage < Config::STAGES; stage++) {
        ptx::mbarrier_init(q_full(stage), 1);
        ptx::mbarrier_init(q_empty(stage), 4);
      }
      ptx::fence_mbarrier_init();
    }
    const int n = threadIdx.x;
    if (n >= p.branches) return;
    gate(n) = gate_of(p.branch[n], b, h);
    int tile = tiles_before(p, n);
    for (int s = p.branch[n].first_segment; s < p.branch[n].end_segment; s++) {
      const int end = key_len_of(p.segment[s], b);
      for (int kv = 0; kv < p.segment[s].seq_kv; kv += 16) keys_in(tile++) = max_of(min_of(end - kv, 16), 0);
    }
  }

 private:
  DEVICE char* tables() const {
    return ptx::dynamic_shared() + (k_full() - shared) + (Config::BARRIER_BYTES + 15) / 16 * 16;
  }
  static DEVICE int tiles_before(const ForwardParams& p, int branch) {
    int tiles = 0;
    for (int n = 0; n < branch; n++) tiles += key_tiles_of(p, n);
    return tiles;
  }
};

// The warp that copies.
template <class Config>
struct ShortProducer : ShortBlock<Config> {
  using Base = ShortBlock<Config>;
  using Base::b;
  using Base::h;
  using Base::maps;
  using Base::p;

  DEVICE explicit ShortProducer(const Base& base) : Base(base), elected(ptx::elect_sync()) {}

  DEVICE void run() const {
    load_keys();
    RingPosition<Config::STAGES> at;
    int tile = this->slot;
    load_q(tile, at.stage);
    load_values();
    for (;;) {
      tile += p.head_blocks;
      at.advance();
      if (tile * Config::BLOCK_Q >= p.seq_q) return;
      // The stage has been read, and out that took its place; the first time around nothing was there.
      wait_for_phase(this->q_empty(at.stage), at.parity ^ 1);
      load_q(tile, at.stage);
    }
  }

 private:
  const bool elected;

  DEVICE void load_q(int tile, int stage) const {
    if (!elected) return;
    ptx::mbarrier_arrive_expect_tx(this->q_full(stage), Config::QTile::BYTES);
    for (int n = 0; n < Config::BLOCKS; n++) {
      ptx::cp_async_bulk_tensor_4d(this->sQ(stage) + n * Config::QTile::BLOCK_BYTES, &maps.q, this->q_full(stage),
                                   n * Config::QTile::COLUMNS, tile * Config::BLOCK_Q, map_index(p.q_stride[2], h),
                                   map_index(p.q_stride[0], b));
    }
  }

  // One tile; of a tensor's end come zeros.
  DEVICE void load(uint32_t sTile, const ptx::TensorMap& map, uint32_t full, const int64_t (&stride)[3], int kv,
                   int head) const {
#pragma unroll 1
    for (int n = 0; n < Config::BLOCKS; n++) {
      ptx::cp_async_bulk_tensor_4d(sTile + n * this->block_bytes(), &map, full, n * Config::QTile::COLUMNS, kv,
                                   map_index(stride[2], head), map_index(stride[0], b));
    }
  }

  // Past the end of out, whose map has boxes of this size and is there without a key as well.
  DEVICE void load_zeros(uint32_t sTile, uint32_t full) const { load(sTile, maps.out, full, p.out_stride, p.seq_q, h); }

  // Keys that nobody asks for, and tiles behind the last, are zeros: no byte of the tensor is read for them.
  DEVICE void load_keys() const {
    if (!elected) return;
    ptx::mbarrier_arrive_expect_tx(this->k_full(), Config::BLOCKS * this->block_bytes());
    int tile = 0;
    for (int n = 0; n < p.branches; n++) {
      const bool wanted = BranchSet::of(p).has(n, this->gate(n));
      for (int i = p.branch[n].first_segment; i < p.branch[n].end_segment; i++) {
        const SegmentParams& s = p.segment[i];
        for (int kv = 0; kv < s.seq_kv; kv += 16, tile++) {
          const int from = wanted && this->keys_in(tile) > 0 ? kv : s.seq_kv;
          load(this->sK(tile), maps.k[i], this->k_full(), s.k_stride, from, h / s.group);
        }
      }
    }
    for (; tile < this->key_tiles; tile++) load_zeros(this->sK(tile), this->k_full());
  }

  // Values of keys that key_len excludes may be anything, and 0 times a NaN is one: they become zeros, which a bulk copy cannot
  // do within a tile. There all lanes copy.
  DEVICE void load_values() const {
    int tiles = 0, cut = 0;
    for (int n = 0; n < p.branches; n++) {
      for (int i = p.branch[n].first_segment; i < p.branch[n].end_segment; i++) {
        for (int kv = 0; kv < p.segment[i].seq_kv; kv += 16, tiles++) cut += is_cut(p.segment[i], n, kv, tiles);
      }
    }
    if (elected) {
      ptx::mbarrier_arrive_expect_tx(this->v_full(), (this->key_tiles - cut) * Config::BLOCKS * Config::TILE_BYTES);
    }
    int tile = 0;
    for (int n = 0; n < p.branches; n++) {
      for (int i = p.branch[n].first_segment; i < p.branch[n].end_segment; i++) {
        const SegmentParams& s = p.segment[i];
        for (int kv = 0; kv < s.seq_kv; kv += 16, tile++) {
          if (is_cut(s, n, kv, tile)) {
            load_cut(s, kv, tile);
          } else if (elected) {
            const int from = this->gate(n) != 0.0f && this->keys_in(tile) > 0 ? kv : s.seq_kv;
            load(this->sV(tile), maps.v[i], this->v_full(), s.v_stride, from, h / s.group);
          }
        }
      }
    }
    for (; elected && tile < this->key_tiles; tile++) load_zeros(this->sV(tile), this->v_full());
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async_shared_cta();
    // Written: cut tiles, by the copies of every lane. Read next: by wgmma, after the phase that one lane completes.
    ptx::bar_warp_sync();
    if (elected) ptx::mbarrier_arrive(this->v_full());
  }

  // Whether key_len ends within a tile that the tensor goes on in.
  DEVICE bool is_cut(const SegmentParams& s, int branch, int kv, int tile) const {
    const int keys = this->keys_in(tile);
    return this->gate(branch) != 0.0f && keys > 0 && keys < min_of(s.seq_kv - kv, 16);
  }

  // A block of columns at a time, and eight rows: the warp has few registers.
  DEVICE void load_cut(const SegmentParams& s, int kv, int tile) const {
    constexpr int ROWS = 8, COLUMNS = Config::QTile::COLUMNS;
    const uint16_t* gV = static_cast<const uint16_t*>(s.v) + b * s.v_stride[0] + h / s.group * s.v_stride[2];
    const int end = kv + this->keys_in(tile);
#pragma unroll 1
    for (int n = 0; n < Config::BLOCKS; n++) {
#pragma unroll 1
      for (int row = 0; row < 16; row += ROWS) {
        const uint32_t sRows = this->sV(tile) + n * this->block_bytes() + row * Config::QTile::PITCH_BYTES;
        load_rows<COLUMNS, ROWS, WARP, SwizzledTile<COLUMNS, ROWS>>(sRows, gV + n * COLUMNS, s.v_stride[1], kv + row, end,
                                                                    p.value_dim - n * COLUMNS, lane_id());
      }
    }
  }
};
