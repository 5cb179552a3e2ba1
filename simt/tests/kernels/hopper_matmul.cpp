// C[m, n] = A[m, k] · B: halves in, f32 out. One block = 64 x 64 of C: a producer warp brings tiles by bulk copies
// through a ring of two stages, a warpgroup multiplies. SHARED: both operands by descriptor, B stored as [n, k].
// Otherwise A comes through registers and B is stored as [k, n].
#include "simt/entry.hpp"
#include "warpgroup.h"

namespace {

struct MatmulParams {
  ptx::TensorMap a, b;
  float* c;
  uint32_t m, n, k, unused[9];
};

constexpr int STAGES = 2, CONSUMERS = 128;
constexpr uint32_t STAGE_BYTES = 2 * TILE_BYTES, BARRIERS = STAGES * STAGE_BYTES;

enum class Variant { Correct, EarlyRelease, Overwritten };

struct Ring {
  uint32_t shared;
  __device__ uint32_t a(int t) const { return shared + t % STAGES * STAGE_BYTES; }
  __device__ uint32_t b(int t) const { return a(t) + TILE_BYTES; }
  __device__ uint32_t full(int t) const { return shared + BARRIERS + t % STAGES * 8; }
  __device__ uint32_t empty(int t) const { return full(t) + STAGES * 8; }
  __device__ uint32_t parity(int t) const { return t / STAGES & 1; }
};

template <bool SHARED>
__device__ __forceinline__ void produce(const MatmulParams& p, const Ring& ring, int tiles) {
  const int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
  for (int t = 0; t < tiles; t++) {
    // The stage has been read, the first time around nothing was there.
    wait_for(ring.empty(t), ring.parity(t) ^ 1);
    ptx::mbarrier_arrive_expect_tx(ring.full(t), STAGE_BYTES);
    ptx::cp_async_bulk_tensor_4d(ring.a(t), &p.a, ring.full(t), t * TILE, row0, 0, 0);  // [refill of a]
    const int b0 = SHARED ? t * TILE : column0, b1 = SHARED ? column0 : t * TILE;
    ptx::cp_async_bulk_tensor_4d(ring.b(t), &p.b, ring.full(t), b0, b1, 0, 0);  // [refill of b]
  }
}

template <class Element, bool SHARED, Variant V>
__device__ __forceinline__ void consume(const MatmulParams& p, const Ring& ring, int tiles) {
  const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float rC[8][4] = {};
  for (int t = 0; t < tiles; t++) {
    uint32_t rA[4][4];
    // Both tiles have landed.
    wait_for(ring.full(t), ring.parity(t));
    if (!SHARED)
      for (uint32_t step = 0; step < 4; step++)
        ptx::ldmatrix_x4(rA[step], ring.a(t) + chunk_place(16 * warp + lane % 16, 2 * step + lane / 16));
    const uint64_t a = descriptor(ring.a(t)), b = descriptor(ring.b(t));
    ptx::wgmma_fence();
    for (int step = 0; step < 4; step++) {
      if (SHARED)
        ptx::wgmma_m64nNk16(Element(), rC, a + (step * 32 >> 4), b + (step * 32 >> 4), true);  // [ss]
      else
        ptx::wgmma_m64nNk16(Element(), rC, rA[step], b + (step * 16 * ROW_BYTES >> 4), true);  // [rs]
    }
    ptx::wgmma_commit_group();
    if (V == Variant::EarlyRelease) ptx::mbarrier_arrive(ring.empty(t));
    if (V == Variant::Overwritten) rA[1][2] = t;  // [overwritten]
    ptx::wgmma_wait_group<0>();
    // This thread's part of the stage has been read.
    if (V != Variant::EarlyRelease) ptx::mbarrier_arrive(ring.empty(t));
  }
  for (uint32_t i = 0; i < 32; i++) {
    const uint32_t row = blockIdx.y * TILE + 16 * warp + lane / 4 + i / 2 % 2 * 8;
    const uint32_t column = blockIdx.x * TILE + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < p.m && column < p.n) p.c[row * p.n + column] = rC[i / 4][i % 4];
  }
}

template <class Element, bool SHARED, Variant V>
__global__ void __launch_bounds__(256, 1) product(const __grid_constant__ MatmulParams p) {
  const Ring ring{ptx::shared_address(ptx::dynamic_shared())};
  const int tiles = (p.k + TILE - 1) / TILE;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      ptx::mbarrier_init(ring.full(s), 1);
      ptx::mbarrier_init(ring.empty(s), CONSUMERS);
    }
    ptx::fence_mbarrier_init();
  }
  // The mbarriers are there for everyone.
  ptx::barrier_cta();
  if (threadIdx.x / 128 == 0) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x / 32 == 0 && ptx::elect_sync()) produce<SHARED>(p, ring, tiles);
  } else {
    ptx::setmaxnreg_inc<216>();
    consume<Element, SHARED, V>(p, ring, tiles);
  }
}

}  // namespace

extern "C" {
void product_ss_f16(const void* p) { simt::entry<product<ptx::F16, true, Variant::Correct>>(p); }
void product_ss_bf16(const void* p) { simt::entry<product<ptx::BF16, true, Variant::Correct>>(p); }
void product_rs_f16(const void* p) { simt::entry<product<ptx::F16, false, Variant::Correct>>(p); }
void product_rs_bf16(const void* p) { simt::entry<product<ptx::BF16, false, Variant::Correct>>(p); }
void product_early_release(const void* p) { simt::entry<product<ptx::F16, true, Variant::EarlyRelease>>(p); }
void product_overwritten(const void* p) { simt::entry<product<ptx::F16, false, Variant::Overwritten>>(p); }
}
