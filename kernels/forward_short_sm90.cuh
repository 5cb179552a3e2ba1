// Forward attention over branches of few keys on sm_90a: IP-Adapter's decoupled cross-attention, text and image prompts.
//
//   out_i = Σ_b (w_bi / l_bi) Σ_j exp(S_ij - m_bi) v_j        docs/math.md, equations 1 to 3 and 7
//
// A block belongs to one head, and stays: keys and values of all branches are in its shared memory, brought once. One warp
// brings queries, 64 at a time, into a ring of STAGES stages by bulk copies (TMA); the n-th tile of a block is computed by
// warpgroup n % CONSUMERS:
//
//   S[64, ROW_KEYS] = Q · K of as many whole branches as fit, one product
//   each branch: whole-row softmax over its columns → P · w / l, rounded
//   rO += P V over these branches' keys, one product; and on with the next branches
//   rO, rounded once → where the queries were → out, by a bulk copy that each warp makes of its 16 rows
//
// The weight w / l is known before the second product, so all branches share one accumulator. A stage goes back to the ring
// when its result has been read, which the warpgroup asks for while its next product runs. Q is read once, out written once,
// keys and values once per block.
// Precision: as in the short kernel for sm_80, with the same power of two taken out of the weights.
// The host guarantees, besides what the streaming kernel asks for: no bias, no cap, no position rule, a positive scale; the padded
// keys of each branch fit ROW_KEYS, those of all branches the shared memory of the launch; out has a map, head_blocks is not
// more than the tiles of queries.
#pragma once
#include "tile/short_producer.cuh"
#include "tile/softmax.cuh"
#include "tile/store.cuh"
#include "tile/warpgroup_product.cuh"

template <class Element, int WIDTH, int ROW_KEYS, int CONSUMERS, int STAGES>
using ShortConfig = WarpgroupShortConfig<Element, WIDTH, ROW_KEYS, CONSUMERS, STAGES>;

// Where branches that share a product begin: the first one, and the first tile of its keys.
struct BranchRun {
  int branch, tile;
};

// A warpgroup that multiplies. `group` counts them from 0.
template <class Config>
struct ShortConsumer : ShortBlock<Config> {
  using Base = ShortBlock<Config>;
  using Base::b;
  using Base::h;
  using Base::p;
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  static constexpr int WIDTH = Config::WIDTH, ROW_KEYS = Config::ROW_KEYS;

  const int group;
  float rO[WIDTH / 8][4];
  PowerOfTwo factor[ROWS_PER_LANE];
  RingPosition<Config::STAGES> at;
  int storing = -1;  // the stage that a store of the warp's may still read

  DEVICE ShortConsumer(const Base& base, int group) : Base(base), group(group) {}

  DEVICE void run() {
    for (int n = 0; n < group; n++) at.advance();
    for (int tile = this->slot + group * p.head_blocks; tile * Config::BLOCK_Q < p.seq_q;
         tile += Config::CONSUMERS * p.head_blocks) {
      attend(tile * Config::BLOCK_Q + warp_id() % 4 * 16);
      for (int n = 0; n < Config::CONSUMERS; n++) at.advance();
    }
    // The block's shared memory is gone when it ends.
    if (lane_id() == 0) ptx::cp_async_bulk_wait_group_read<0>();
  }

 private:
  // Sixty-four queries over all branches; the warp's first is `row`.
  DEVICE void attend(int row) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) factor[r] = factor_of(p, b, h, row + fragment_row(2 * r));
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] = 0.0f;
    }
    // Written: Q, by bulk copies.
    wait_for_phase(this->q_full(at.stage), at.parity);
    for (int branch = 0, tile = 0; branch < p.branches;) attend_branches(row, branch, tile);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rO[n][i] *= factor[i / 2].up;
    }
    store(row);
  }

  // As many branches as one product holds, from `branch` on, whose keys start at `tile`; moves both on.
  DEVICE void attend_branches(int row, int& branch, int& tile) {
    const BranchRun run{branch, tile};
    do tile += key_tiles_of(p, branch++);
    while (branch < p.branches && tile + key_tiles_of(p, branch) - run.tile <= ROW_KEYS / 16);
    if constexpr (ROW_KEYS > Config::FEW_KEYS) {
      if (tile - run.tile <= Config::FEW_KEYS / 16) return attend_keys<Config::FEW_KEYS>(row, run, branch);
    }
    attend_keys<ROW_KEYS>(row, run, branch);
  }

  // Branches [run.branch, end_branch), by a product of KEYS keys.
  template <int KEYS>
  DEVICE void attend_keys(int row, const BranchRun& run, int end_branch) {
    // The first tile of the product: no later than that it ends with the keys.
    const int window = min_of(run.tile, this->key_tiles - KEYS / 16);
    float rS[KEYS / 8][4];
    uint32_t rP[KEYS / 16][4];
    // Written: all keys, by bulk copies.
    wait_for_phase(this->k_full(), 0);
    ptx::wgmma_fence();
    issue_qk<Element, WIDTH, KEYS>(rS, this->sQ(at.stage), this->sK(window), this->block_bytes());
    ptx::wgmma_commit_group();
    release_stored();
    ptx::wgmma_wait_group<0>();

    int end = run.tile - window;
    clear(rS, 0, end);
    for (int n = run.branch; n < end_branch; n++) {
      const int from = end;
      end += key_tiles_of(p, n);
      weigh_branch(rS, row, n, window, from, end);
    }
    clear(rS, end, KEYS / 16);
    pack_probabilities<Element, KEYS>(rP, rS);
    // Written: all values, by bulk copies, and those that key_len cuts by the producer's lanes.
    wait_for_phase(this->v_full(), 0);
    // Written: rP and rO. Used next: by the product.
    ptx::wgmma_fence();
    issue_pv<Element, WIDTH, KEYS>(rO, rP, this->sV(window), this->block_bytes());
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
  }

  // Calls visit(n, i) for every element i of tiles [from, end) of rS.
  template <int COLUMNS, class Visit>
  static DEVICE void for_tiles(float (&rS)[COLUMNS][4], int from, int end, Visit visit) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 2; n++) {
      if (n < from || n >= end) continue;
#pragma unroll
      for (int i = 0; i < 8; i++) visit(rS[2 * n + i / 4][i % 4], i % 4 / 2);
    }
  }

  // Tiles of other branches count for nothing in this product.
  template <int COLUMNS>
  static DEVICE void clear(float (&rS)[COLUMNS][4], int from, int end) {
    for_tiles(rS, from, end, [](float& s, int) { s = 0.0f; });
  }

  // Tiles [from, end) of rS: products -> probabilities · weight; writes lse.
  template <int COLUMNS>
  DEVICE void weigh_branch(float (&rS)[COLUMNS][4], int row, int number, int window, int from, int end) {
    const float gate = this->gate(number);
    if (!BranchSet::of(p).has(number, gate)) return clear(rS, from, end);
    float max[ROWS_PER_LANE] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
    for (int n = 0; n < COLUMNS / 2; n++) {
      if (n >= from && n < end) exclude(rS, n, this->keys_in(window + n));
    }
    for_tiles(rS, from, end, [&](float& s, int r) { max[r] = ptx::max_f32(s, max[r]); });
    float shift[ROWS_PER_LANE], sum[ROWS_PER_LANE] = {0.0f, 0.0f}, weight[ROWS_PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      max[r] = quad_max(max[r]) * p.softmax_scale;
      shift[r] = shift_of(max[r]) * LOG2E;
    }
    for_tiles(rS, from, end, [&](float& s, int r) {
      s = ptx::ex2_approx_ftz_f32(ptx::fma_rn_f32(s, p.softmax_scale * LOG2E, -shift[r]));
      sum[r] += s;
    });
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      const float total = quad_sum(sum[r]);
      store_lse(p, number, b, h, query, lse_of(max[r], total));
      weight[r] = total == 0.0f ? 0.0f : gate * region_of(p.branch[number], p, b, h, query) * factor[r].down / total;
    }
    // A closed gate got here for its lse alone: not even NaN may pass it.
    if (gate == 0.0f) return clear(rS, from, end);
    for_tiles(rS, from, end, [&](float& s, int r) { s *= weight[r]; });
  }

  // Tile n of rS: -inf from key `keys` on.
  template <int COLUMNS>
  static DEVICE void exclude(float (&rS)[COLUMNS][4], int n, int keys) {
    if (keys >= 16) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& s = rS[2 * n + i / 4][i % 4];
      s = i / 4 * 8 + fragment_column(i) < keys ? s : NEGATIVE_INFINITY;
    }
  }

  // Each warp stages its own rows where its queries were, which only its own products have read.
  DEVICE void store(int row) {
    const OutRows out{p, b, h, row};
    const uint32_t offset = at.stage * QTile::BYTES + warp_id() % 4 * 16 * QTile::PITCH_BYTES;
    if (p.accumulate != 0) out.template add_held<Element, WIDTH>(rO);
    out.template stage<Element, WIDTH, QTile>(rO, ptx::dynamic_shared() + offset, false);
    ptx::fence_proxy_async_shared_cta();
    // Written: the rows, by the lanes that hold their fragments. Read next: by the copy that one lane starts.
    ptx::bar_warp_sync();
    if (lane_id() == 0) {
      for (int n = 0; n < Config::BLOCKS; n++) {
        ptx::cp_async_bulk_tensor_store_4d(&this->maps.out, this->shared + offset + n * QTile::BLOCK_BYTES,
                                           n * QTile::COLUMNS, row, h, b);
      }
      ptx::cp_async_bulk_commit_group();
    }
    storing = at.stage;
  }

  // Gives the stage of the tile before back to the ring, if the warp has not yet.
  DEVICE void release_stored() {
    if (storing >= 0 && lane_id() == 0) {
      ptx::cp_async_bulk_wait_group_read<0>();
      ptx::mbarrier_arrive(this->q_empty(storing));
    }
    storing = -1;
  }
};

// One block: which head, which of its queries, and the work.
template <class Config>
DEVICE void forward_short(const MappedForwardParams& maps) {
  const ForwardParams& p = maps.forward;
  const int heads_before = blockIdx.x / p.head_blocks;
  const ShortBlock<Config> block(maps, heads_before / p.heads, heads_before % p.heads, blockIdx.x % p.head_blocks);
  block.prepare();
  // Written: the mbarriers and the tables. Read next: by everyone.
  ptx::barrier_cta();
  if (warp_id() < 4) {
    ptx::setmaxnreg_dec<RegisterShare<Config::CONSUMERS>::PRODUCER>();
    if (warp_id() == 0) ShortProducer<Config>(block).run();
  } else {
    ptx::setmaxnreg_inc<RegisterShare<Config::CONSUMERS>::CONSUMER>();
    // The same for the whole warp, which the compiler could not know otherwise.
    const int warpgroup = int(ptx::shfl_idx_b32(uint32_t(warp_id() / 4), 0));
    ShortConsumer<Config>(block, warpgroup - 1).run();
  }
}
