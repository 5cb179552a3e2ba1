// The keys' side of the backward: dk and dv, from the statistics that the queries' side left.
//
//   dv_j = Σ_i w_i P_ij dout_i                                               docs/math.md, equations 9 to 11
//   dk_j = softmax_scale · Σ_i w_i P_ij (dout_i · v_j - g_i) cap'(z_ij) q_i
//
// The forward's picture with queries and keys in each other's place. One block has 64 keys of one segment and head; each of
// its four warps has 16 of them and sees all queries that may attend to them, of every head of the group, and of every batch
// entry where keys and values broadcast:
//
//   warp   Sᵀ = K Qᵀ  dPᵀ = V doutᵀ   in registers, 16 x BLOCK_Q each
//          w Pᵀ, dSᵀ                  rounded, A operands as they lie
//          dV += w Pᵀ dout, dK += dSᵀ Q   in registers, 16 x WIDTH each, f32
//
// K and V are read once; tiles of Q and dout, with the statistics and weights of their queries, pass through a ring of two
// stages. Where there are few tiles of keys several blocks share one, each with a part of the queries, and the parts are
// added up afterwards (backward_reduce_sm80.cuh): no atomics, so two runs give the same bits.
// Precision: products in f32; w P and dS are rounded to the element type, after a power of two near the largest weight so
// far was taken out of them; dk and dv once at the store.
// The host guarantees, besides what the queries' side asks for: rows of dk and dv start at multiples of 16 bytes.
#pragma once
#include "params.h"
#include "tile/load.cuh"
#include "tile/product.cuh"
#include "tile/query_cursor.cuh"
#include "tile/statistics.cuh"
#include "tile/store.cuh"

template <class Element_, int WIDTH_, int BLOCK_Q_>
struct BackwardKeysConfig {
  using Element = Element_;
  static constexpr int WIDTH = WIDTH_;      // of the tiles; head_dim and value_dim may be less
  static constexpr int BLOCK_Q = BLOCK_Q_;  // queries of a tile
  static constexpr int WARPS = 4;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int BLOCK_KV = WARPS * 16;
  static constexpr int STAGES = 2;
  static constexpr bool IN_REGISTERS = WIDTH <= 40;
  // Accumulators of both gradients do not fit the registers of wide rows: dv first, then all again for dk.
  static constexpr bool TOGETHER = WIDTH <= 128;

  using Tile = SharedTile<WIDTH>;
  static constexpr int KEYS_BYTES = Tile::bytes(BLOCK_KV);
  static constexpr int ROWS_BYTES = Tile::bytes(BLOCK_Q);
  // Shift, inverse, g and region of each query, f32.
  static constexpr int STAGE_BYTES = 2 * ROWS_BYTES + 4 * BLOCK_Q * 4;
  static constexpr int shared_bytes(int /* branches */, int /* key_tiles */, int /* gradient_tiles */) {
    return 2 * KEYS_BYTES + STAGES * STAGE_BYTES;
  }
  static_assert(BLOCK_Q % 16 == 0 && BLOCK_Q <= THREADS, "queries are taken 16 at a time, their statistics by a thread each");
};

template <class Config>
struct BackwardKeys {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  static constexpr int WIDTH = Config::WIDTH, BLOCK_Q = Config::BLOCK_Q, BLOCK_KV = Config::BLOCK_KV;
  using Cursor = QueryCursor<BLOCK_Q, BLOCK_KV>;

  const BackwardParams& p;
  const ForwardParams& f;
  const KeyBlock keys;
  const int kv;  // first key of the warp
  char* const shared;
  const uint32_t sK, sV;

  RowsA<WIDTH, Config::IN_REGISTERS> k, v;
  float rDk[WIDTH / 8][4];
  float rDv[Config::TOGETHER ? WIDTH / 8 : 1][4];
  PowerOfTwo factor;  // taken out of the weights
  bool any;           // the factor is that of something

  DEVICE BackwardKeys(const BackwardParams& p, const KeyBlock& keys)
      : p(p),
        f(p.forward),
        keys(keys),
        kv(keys.kv + warp_id() * 16),
        shared(ptx::dynamic_shared()),
        sK(ptx::shared_address(shared)),
        sV(sK + Config::KEYS_BYTES) {}

  DEVICE void run() {
    load_keys();
    const SegmentGradients& to = p.segment[keys.segment];
    if constexpr (Config::TOGETHER) {
      sweep<true, true>(rDk, rDv);
      store(to.dk, rDk, factor.up * f.softmax_scale, f.head_dim);
      store(to.dv, rDv, factor.up, f.value_dim);
    } else {
      if (to.dv.to != nullptr) {
        sweep<false, true>(rDk, rDk);
        store(to.dv, rDk, factor.up, f.value_dim);
      }
      if (to.dk.to != nullptr) {
        sweep<true, false>(rDk, rDk);
        store(to.dk, rDk, factor.up * f.softmax_scale, f.head_dim);
      }
    }
  }

 private:
  DEVICE char* stage_at(int stage) const { return shared + 2 * Config::KEYS_BYTES + stage * Config::STAGE_BYTES; }
  DEVICE uint32_t sQ(int stage) const { return sK + 2 * Config::KEYS_BYTES + stage * Config::STAGE_BYTES; }
  DEVICE uint32_t sDout(int stage) const { return sQ(stage) + Config::ROWS_BYTES; }
  DEVICE uint32_t sRows(int stage) const { return sDout(stage) + Config::ROWS_BYTES; }
  DEVICE const float* rows_at(int stage) const {
    return reinterpret_cast<const float*>(stage_at(stage) + 2 * Config::ROWS_BYTES);
  }

  DEVICE void load_keys() {
    const SegmentParams& s = f.segment[keys.segment];
    const uint16_t* gK = static_cast<const uint16_t*>(s.k) + keys.b * s.k_stride[0] + keys.head * s.k_stride[2];
    const uint16_t* gV = static_cast<const uint16_t*>(s.v) + keys.b * s.v_stride[0] + keys.head * s.v_stride[2];
    // Keys that some batch entry has.
    const int batches = p.segment[keys.segment].key_batch == 1 ? f.batch : 1;
    int end = 0;
    for (int b = 0; b < batches; b++) end = max_of(key_len_of(s, keys.b + b), end);
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sK, gK, s.k_stride[1], keys.kv, end, f.head_dim, threadIdx.x);
    load_rows<WIDTH, BLOCK_KV, Config::THREADS>(sV, gV, s.v_stride[1], keys.kv, end, f.value_dim, threadIdx.x);
  }

  DEVICE void load_tile(const Cursor& tile, int stage) {
    const uint16_t* gQ = static_cast<const uint16_t*>(f.q) + tile.b * f.q_stride[0] + tile.h * f.q_stride[2];
    const uint16_t* gDout = static_cast<const uint16_t*>(p.dout) + tile.b * p.dout_stride[0] + tile.h * p.dout_stride[2];
    load_rows<WIDTH, BLOCK_Q, Config::THREADS>(sQ(stage), gQ, f.q_stride[1], tile.row, f.seq_q, f.head_dim, threadIdx.x);
    load_rows<WIDTH, BLOCK_Q, Config::THREADS>(sDout(stage), gDout, p.dout_stride[1], tile.row, f.seq_q, f.value_dim,
                                                threadIdx.x);
    if (threadIdx.x >= BLOCK_Q) return;
    const int i = threadIdx.x, query = tile.row + i;
    // Zeros past the last query: it has no probability for any key.
    const bool inside = query < f.seq_q;
    const int valid = inside ? query : tile.row, bytes = inside ? 4 : 0;
#pragma unroll
    for (int which = 0; which < 3; which++) {
      const float* source = statistic(p, which, keys.branch, tile.b, tile.h, valid);
      ptx::cp_async_ca_4(sRows(stage) + (which * BLOCK_Q + i) * 4, source, bytes);
    }
    const BranchParams& branch = f.branch[keys.branch];
    if (branch.region == nullptr) return;
    const float* region = branch.region + tile.b * branch.region_stride[0] + tile.h * branch.region_stride[1];
    ptx::cp_async_ca_4(sRows(stage) + (3 * BLOCK_Q + i) * 4, region + valid * branch.region_stride[2], bytes);
  }

  // The tile after `tile`. Not kept while that one is worked on: finding it again costs less than its registers do.
  DEVICE void load_next(Cursor tile, int stage) {
    tile.advance(p, keys);
    if (!tile.done()) load_tile(tile, stage);
    ptx::cp_async_commit_group();
  }

  // All queries once. Leaves dk in `dk` if DK, dv in `dv` if DV, both but for the factor.
  template <bool DK, bool DV>
  DEVICE void sweep(float (&dk)[WIDTH / 8][4], float (&dv)[WIDTH / 8][4]) {
    any = false;
    factor = {1.0f, 1.0f};
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (DK) dk[n][i] = 0.0f;
        if (DV) dv[n][i] = 0.0f;
      }
    }
    Cursor tile;
    tile.start(p, keys);
    if (!tile.done()) load_tile(tile, 0);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    // Written: keys, values and the first stage, by every thread's copies. Read next: by every warp.
    ptx::barrier_cta();
    k.load(sK, warp_id() * 16);
    v.load(sV, warp_id() * 16);
    for (int stage = 0; !tile.done(); stage ^= 1) {
      load_next(tile, stage ^ 1);
      attend<DK, DV>(dk, dv, tile, stage);
      ptx::cp_async_wait_group<0>();
      // Written: the other stage, by every thread's copies; read next by every warp. Read: this stage, by every warp;
      // written next by the copies of the following iteration, or of the next sweep.
      ptx::barrier_cta();
      tile.advance(p, keys);
    }
  }

  template <bool DK, bool DV>
  DEVICE void attend(float (&dk)[WIDTH / 8][4], float (&dv)[WIDTH / 8][4], const Cursor& tile, int stage) {
    const bool region = f.branch[keys.branch].region != nullptr;
    const float* sRegion = rows_at(stage) + 3 * BLOCK_Q;
    if (!take_factor<DK, DV>(dk, dv, tile.gate, region ? sRegion : nullptr)) return;

    const SegmentParams& s = f.segment[keys.segment];
    const SegmentGradients& to = p.segment[keys.segment];
    const SharedStatistics<BLOCK_Q> statistics{rows_at(stage)};
    const Mask mask{s, tile.b, tile.h, f.seq_q, tile.key_len};
    float rS[BLOCK_Q / 8][4], rD[BLOCK_Q / 8][4];
    product_qk<Element, BLOCK_Q>(rS, k, sQ(stage));
    mask.template cap<BLOCK_Q>(rS, f);
    const bool dk_wanted = DK && to.dk.to != nullptr;
    if (dk_wanted) {
      product_qk<Element, BLOCK_Q>(rD, v, sDout(stage));
      subtract_g<BLOCK_Q>(rD, statistics);
      multiply_slope<BLOCK_Q>(rD, rS, f);
    }
    const bool open = all_attend(s, f.seq_q, tile.row, BLOCK_Q, keys.kv, BLOCK_KV, tile.key_len);
    mask.template admit_transposed<BLOCK_Q>(rS, tile.row, kv, open);
    probabilities<BLOCK_Q>(rS, statistics);
    const float gate = tile.gate * factor.down;
#pragma unroll
    for (int n = 0; n < BLOCK_Q / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rS[n][i] *= region ? gate * sRegion[n * 8 + fragment_column(i)] : gate;
    }
    uint32_t rA[BLOCK_Q / 8][2];
    if (DV && to.dv.to != nullptr) {
      pack(rA, rS);
      product_pv<Element, WIDTH, BLOCK_Q>(dv, rA, sDout(stage));
    }
    if (dk_wanted) {
#pragma unroll
      for (int n = 0; n < BLOCK_Q / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) rD[n][i] *= rS[n][i];
      }
      pack(rA, rD);
      product_pv<Element, WIDTH, BLOCK_Q>(dk, rA, sQ(stage));
    }
  }

  static DEVICE void pack(uint32_t (&rA)[BLOCK_Q / 8][2], const float (&rows)[BLOCK_Q / 8][4]) {
#pragma unroll
    for (int n = 0; n < BLOCK_Q / 8; n++) {
#pragma unroll
      for (int r = 0; r < ROWS_PER_LANE; r++) rA[n][r] = Element::pack(rows[n][2 * r], rows[n][2 * r + 1]);
    }
  }

  // Brings the factor up to the tile's weights, and the sums so far with it. False if all its weights are 0.
  template <bool DK, bool DV>
  DEVICE bool take_factor(float (&dk)[WIDTH / 8][4], float (&dv)[WIDTH / 8][4], float gate, const float* sRegion) {
    float largest = gate < 0.0f ? -gate : gate;
    if (sRegion != nullptr) {
      float region = 0.0f;
      for (int i = lane_id(); i < BLOCK_Q; i += WARP) region = max_of(sRegion[i] < 0.0f ? -sRegion[i] : sRegion[i], region);
#pragma unroll
      for (int mask = 1; mask < WARP; mask *= 2) region = max_of(region, ptx::shfl_bfly_f32(region, mask));
      largest *= region;
    }
    if (largest == 0.0f) return false;
    const PowerOfTwo wanted = PowerOfTwo::of(largest);
    if (any && wanted.up <= factor.up) return true;
    if (any) {
      const float change = factor.up * wanted.down;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (DK) dk[n][i] *= change;
          if (DV) dv[n][i] *= change;
        }
      }
    }
    factor = wanted;
    any = true;
    return true;
  }

  DEVICE void store(const GradientRows& to, const float (&rows)[WIDTH / 8][4], float scale, int width) {
    if (to.to == nullptr) return;
    const float factors[ROWS_PER_LANE] = {scale, scale};
    const GradientTile tile{keys.part, keys.b, keys.head, kv, f.segment[keys.segment].seq_kv, 0, width};
    store_gradient<Element, WIDTH>(to, tile, rows, factors);
  }
};

// One block: which keys, and the work.
template <class Config>
DEVICE void backward_keys(const BackwardParams& p) {
  const ForwardParams& f = p.forward;
  int segment = 0, block = blockIdx.x;
  for (; block >= p.segment[segment].key_blocks; segment++) block -= p.segment[segment].key_blocks;
  const SegmentParams& s = f.segment[segment];
  const int parts = p.segment[segment].key_parts, heads = f.heads / s.group;
  const int tiles = (s.seq_kv + Config::BLOCK_KV - 1) / Config::BLOCK_KV;
  KeyBlock keys{segment, 0, 0, 0, 0, block % parts, parts};
  block /= parts;
  keys.kv = block % tiles * Config::BLOCK_KV;
  block /= tiles;
  keys.head = block % heads;
  keys.b = block / heads;
  while (segment >= f.branch[keys.branch].end_segment) keys.branch++;
  BackwardKeys<Config>(p, keys).run();
}
