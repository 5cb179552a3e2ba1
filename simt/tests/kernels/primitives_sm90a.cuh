// As primitives.cuh, those that only sm_90a has. One block.
#pragma once
#include "buffers.h"
#include "warpgroup.h"

// out: how many lanes of the warp were elected, and how many of them a second time.
__device__ void elect(const MappedBuffers& p) {
  const bool first = ptx::elect_sync(), again = ptx::elect_sync();
  float once = first ? 1.0f : 0.0f, twice = first && again ? 1.0f : 0.0f;
  for (uint32_t mask = 1; mask < 32; mask *= 2) {
    once += ptx::shfl_bfly_f32(once, mask);
    twice += ptx::shfl_bfly_f32(twice, mask);
  }
  auto* out = reinterpret_cast<float*>(p.out);
  out[threadIdx.x] = once;
  out[32 + threadIdx.x] = twice;
}

// 384 threads: one warpgroup gives registers, the others take them.
__device__ void change_registers(const MappedBuffers& p) {
  if (threadIdx.x < 128) ptx::setmaxnreg_dec<40>();
  else ptx::setmaxnreg_inc<232>();
  p.out[threadIdx.x] = p.in[threadIdx.x] + 1;
}

// 64 threads: each sees the opposite thread's word, twice, with one mbarrier between.
__device__ void mbarriers(const MappedBuffers& p) {
  uint32_t* s = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const uint32_t t = threadIdx.x, barrier = ptx::shared_address(s + 64);
  if (t == 0) ptx::mbarrier_init(barrier, 64);
  ptx::barrier_cta();
  s[t] = p.in[t];
  ptx::mbarrier_arrive(barrier);
  // Written: every word. Read next: by the opposite thread.
  wait_for(barrier, 0);
  const uint32_t opposite = s[63 - t];
  ptx::mbarrier_arrive(barrier);
  // Read: every word. Written next: by its own thread.
  wait_for(barrier, 1);
  s[t] = 3 * opposite;
  ptx::mbarrier_arrive(barrier);
  wait_for(barrier, 0);
  p.out[t] = s[t ^ 1];
}

// Boxes of 16 rows of 64 halves of a tensor of four dimensions, swizzled.
constexpr uint32_t BOX_WORDS = 16 * ROW_BYTES / 4;

// 128 threads. in: the tensor. out: two boxes as they lie in shared memory, each in part outside of the tensor, then the first
// one's place with another box.
__device__ void bulk_load(const MappedBuffers& p) {
  uint32_t* s = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const uint32_t shared = ptx::shared_address(s), full = ptx::shared_address(s + 2 * BOX_WORDS);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, 2 * 4 * BOX_WORDS);
    ptx::cp_async_bulk_tensor_4d(shared, &p.from, full, 8, -3, 2, 1);
    ptx::cp_async_bulk_tensor_4d(shared + 4 * BOX_WORDS, &p.from, full, -16, 20, 1, 0);
  }
  // The mbarrier is there for everyone.
  ptx::barrier_cta();
  wait_for(full, 0);
  for (uint32_t i = threadIdx.x; i < 2 * BOX_WORDS; i += 128) p.out[i] = s[i];
  // Every word has been read, and one, written since, is to be overwritten.
  ptx::barrier_cta();
  if (threadIdx.x == 0) {
    s[5] = 7;
    ptx::fence_proxy_async_shared_cta();
    ptx::mbarrier_arrive_expect_tx(full, 4 * BOX_WORDS);
    ptx::cp_async_bulk_tensor_4d(shared, &p.from, full, 0, 4, 0, 1);
  }
  wait_for(full, 1);
  for (uint32_t i = threadIdx.x; i < BOX_WORDS; i += 128) p.out[2 * BOX_WORDS + i] = s[i];
}

// 128 threads. in: the words of two boxes as they lie in shared memory. out: the tensor, with both, in part outside of it, and with
// the first one's place stored again with other words.
__device__ void bulk_store(const MappedBuffers& p) {
  uint32_t* s = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const uint32_t shared = ptx::shared_address(s);
  for (uint32_t i = threadIdx.x; i < 2 * BOX_WORDS; i += 128) s[i] = p.in[i];
  // This thread's words are visible to the copies,
  ptx::fence_proxy_async_shared_cta();
  // and everyone's.
  ptx::barrier_cta();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_store_4d(&p.to, shared, 8, -3, 2, 1);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_tensor_store_4d(&p.to, shared + 4 * BOX_WORDS, -16, 20, 1, 0);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<1>();
  }
  // Read: the first box. Written next: its place.
  ptx::barrier_cta();
  for (uint32_t i = threadIdx.x; i < BOX_WORDS; i += 128) s[i] = ~p.in[i];
  ptx::fence_proxy_async_shared_cta();
  ptx::barrier_cta();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_tensor_store_4d(&p.to, shared, 0, 4, 0, 1);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

// Of a thread's accumulator, in order. Each element goes through an instruction that the compiler leaves behind the wait.
template <int TILES>
__device__ uint32_t hash(const float (&d)[TILES][4]) {
  uint32_t all = 2166136261u;
  for (int i = 0; i < 4 * TILES; i++) {
    const float element = ptx::fma_rn_f32(d[i / 4][i % 4], 1.0f, 0.0f);
    uint32_t bits;
    __builtin_memcpy(&bits, &element, 4);
    all = (all ^ bits) * 16777619u;
  }
  return all;
}

// 128 threads. in: five tiles of 64 x 64, the first one A, of which two steps of 16 columns are multiplied. out: a hash of each
// thread's accumulator, with both operands in shared memory, then with A in registers.
template <class Element, int TILES>
__device__ void wgmma(const MappedBuffers& p) {
  uint32_t* s = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  for (uint32_t i = threadIdx.x; i < 5 * TILE_BYTES / 4; i += 128) {
    const uint32_t place = i / 2048 * TILE_BYTES + chunk_place(i % 2048 / 32, i % 32 / 4) + i % 4 * 4;
    s[place / 4] = p.in[i];
  }
  ptx::fence_proxy_async_shared_cta();
  // Written: all tiles. Read next: by every warp's products.
  ptx::barrier_cta();
  const uint32_t shared = ptx::shared_address(s), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t a[2][4];
  for (uint32_t step = 0; step < 2; step++)
    ptx::ldmatrix_x4(a[step], shared + chunk_place(16 * warp + lane % 16, 2 * step + lane / 16));
  const uint64_t first = descriptor(shared), second = descriptor(shared + TILE_BYTES);
  // The next 64 columns of an operand that is MN-major.
  const uint64_t columns = second + (uint64_t(TILE_BYTES / 16 - 1) << 16);
  // From 1, which the first step does not add to.
  float d[TILES][4];
  for (int i = 0; i < 4 * TILES; i++) d[i / 4][i % 4] = 1.0f;
  ptx::wgmma_fence();
  ptx::wgmma_m64nNk16(Element(), d, first, second, false);
  ptx::wgmma_commit_group();
  ptx::wgmma_m64nNk16(Element(), d, first + (32 >> 4), second + (32 >> 4), true);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  p.out[threadIdx.x] = hash(d);
  ptx::wgmma_fence();
  ptx::wgmma_m64nNk16(Element(), d, a[0], columns, false);
  ptx::wgmma_m64nNk16(Element(), d, a[1], columns + (16 * ROW_BYTES >> 4), true);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  p.out[128 + threadIdx.x] = hash(d);
}
