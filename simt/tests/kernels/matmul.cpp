// C[m, n] = A[m, k] · B[k, n]: halves in, f32 out, all row-major. One block = 64 x 64 of C, one warp = 16 rows of it.
// Tiles of A and B come through a two-stage cp.async pipeline; rows and columns outside the matrices are zero-filled.
#include "ptx/contract.h"
#include "simt/entry.hpp"

namespace {

struct MatmulParams {
  const uint16_t* a;
  const uint16_t* b;
  float* c;
  uint32_t m, n, k, unused;  // n and k are multiples of 8: rows are 16-byte aligned
};

constexpr int TILE = 64, THREADS = 128, CHUNK = 8;   // a chunk is 16 bytes of halves
constexpr int ROW_BYTES = TILE * 2, TILE_BYTES = TILE * ROW_BYTES;

enum class Variant { Correct, Unswizzled, NoWait, NoCommit, NoBarrierAfterWait, NoBarrierBeforeRefill };

template <Variant V>
__device__ __forceinline__ uint32_t tile_address(uint32_t tile, int row, int chunk) {
  const int place = V == Variant::Unswizzled ? chunk : chunk ^ (row & 7);
  return tile + row * ROW_BYTES + place * 16;
}

// 64 x 64 of `matrix` from (row0, column0) on, asynchronously.
template <Variant V>
__device__ __forceinline__ void load_tile(uint32_t tile, const uint16_t* matrix, int row0, int column0, int rows,
                                          int columns) {
  for (int i = threadIdx.x; i < TILE * TILE / CHUNK; i += THREADS) {
    const int row = i / (TILE / CHUNK), chunk = i % (TILE / CHUNK), column = column0 + chunk * CHUNK;
    const bool inside = row0 + row < rows && column < columns;
    const uint16_t* source = inside ? matrix + int64_t(row0 + row) * columns + column : matrix;
    ptx::cp_async_cg_16(tile_address<V>(tile, row, chunk), source, inside ? 16 : 0);
  }
}

template <class Element, Variant V>
__global__ void __launch_bounds__(THREADS) matmul(const __grid_constant__ MatmulParams p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared());
  const int tiles = (p.k + TILE - 1) / TILE;
  auto load = [&](int t) {
    const uint32_t stage = shared + t % 2 * 2 * TILE_BYTES;
    load_tile<V>(stage, p.a, row0, t * TILE, p.m, p.k);
    load_tile<V>(stage + TILE_BYTES, p.b, t * TILE, column0, p.k, p.n);
  };

  float rC[TILE / 8][4] = {};
  load(0);
  ptx::cp_async_commit_group();
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles) load(t + 1);
    if (V != Variant::NoCommit) ptx::cp_async_commit_group();
    if (V != Variant::NoWait) ptx::cp_async_wait_group<1>();
    // Every thread has waited for its own part of stage t; after this, all of the stage is there for the ldmatrix
    // below.
    if (V != Variant::NoBarrierAfterWait) ptx::barrier_cta();

    const uint32_t sA = shared + t % 2 * 2 * TILE_BYTES, sB = sA + TILE_BYTES;
    for (int k = 0; k < TILE / 16; k++) {
      uint32_t rA[4];
      ptx::ldmatrix_x4(rA, tile_address<V>(sA, warp * 16 + lane % 16, k * 2 + lane / 16));
      for (int n = 0; n < TILE / 16; n++) {
        uint32_t rB[4];
        ptx::ldmatrix_x4_trans(rB, tile_address<V>(sB, k * 16 + lane % 16, n * 2 + lane / 16));
        ptx::mma_m16n8k16(Element{}, rC[2 * n], rA, rB[0], rB[1]);
        ptx::mma_m16n8k16(Element{}, rC[2 * n + 1], rA, rB[2], rB[3]);
      }
    }
    // All warps have read stage t; the next round may load stage t + 2 over it.
    if (V != Variant::NoBarrierBeforeRefill) ptx::barrier_cta();
  }
  for (int n = 0; n < TILE / 8; n++)
    for (int i = 0; i < 4; i++) {
      const uint32_t row = row0 + warp * 16 + lane / 4 + i / 2 * 8, column = column0 + n * 8 + lane % 4 * 2 + i % 2;
      if (row < p.m && column < p.n) p.c[int64_t(row) * p.n + column] = rC[n][i];
    }
}

}  // namespace

extern "C" {
void matmul_f16(const void* p) { simt::entry<matmul<ptx::F16, Variant::Correct>>(p); }
void matmul_bf16(const void* p) { simt::entry<matmul<ptx::BF16, Variant::Correct>>(p); }
void matmul_unswizzled(const void* p) { simt::entry<matmul<ptx::F16, Variant::Unswizzled>>(p); }
void matmul_no_wait(const void* p) { simt::entry<matmul<ptx::F16, Variant::NoWait>>(p); }
void matmul_no_commit(const void* p) { simt::entry<matmul<ptx::F16, Variant::NoCommit>>(p); }
void matmul_no_barrier_after_wait(const void* p) { simt::entry<matmul<ptx::F16, Variant::NoBarrierAfterWait>>(p); }
void matmul_no_barrier_before_refill(const void* p) {
  simt::entry<matmul<ptx::F16, Variant::NoBarrierBeforeRefill>>(p);
}
}
