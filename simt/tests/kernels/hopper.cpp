// One kernel per rule of mbarriers, bulk copies, wgmma and the async proxy, right and with the one mistake its name
// says. Blocks of 128 threads unless a test says otherwise. Tests find the lines by the words in brackets.
#include "simt/entry.hpp"
#include "warpgroup.h"

namespace {

struct HopperParams {
  ptx::TensorMap map;
  const uint32_t* in;
  uint32_t* out;
  uint64_t unused[6];
};

__device__ __forceinline__ uint32_t* words(uint32_t offset) {
  return reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + offset);
}

enum class Ring {
  Correct, NoInitBarrier, NoInitFence, WrongCount, ProducerParity, ConsumerParity, TooManyBytes, TooFewBytes, NoWait
};

// Warp 0 brings the four tiles of a tensor of 256 rows through two stages, the others sum up their words.
template <Ring V>
__global__ void ring(const __grid_constant__ HopperParams p) {
  constexpr uint32_t TILES = 4, STAGES = 2, CONSUMERS = 96;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared()), full = shared + STAGES * TILE_BYTES,
                 empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < STAGES; s++) {
      ptx::mbarrier_init(full + 8 * s, 1);  // [ring init full]
      ptx::mbarrier_init(empty + 8 * s, V == Ring::WrongCount ? CONSUMERS + 1 : CONSUMERS);
    }
    if (V != Ring::NoInitFence) ptx::fence_mbarrier_init();
  }
  // The mbarriers are there for everyone.
  if (V != Ring::NoInitBarrier) ptx::barrier_cta();
  if (threadIdx.x < 32) {
    if (!ptx::elect_sync()) return;
    for (uint32_t t = 0; t < TILES; t++) {
      const uint32_t s = t % STAGES, parity = t / STAGES & 1;
      const uint32_t stage = shared + s * TILE_BYTES;
      const uint32_t bytes = TILE_BYTES + (V == Ring::TooManyBytes ? 16 : 0) - (V == Ring::TooFewBytes ? 16 : 0);
      // The stage has been read, the first time around nothing was there.
      wait_for(empty + 8 * s, V == Ring::ProducerParity ? parity : parity ^ 1);  // [ring wait empty]
      ptx::mbarrier_arrive_expect_tx(full + 8 * s, bytes);
      ptx::cp_async_bulk_tensor_4d(stage, &p.map, full + 8 * s, 0, int(t * TILE), 0, 0);  // [ring issue]
    }
    return;
  }
  uint32_t sum = 0;
  for (uint32_t t = 0; t < TILES; t++) {
    const uint32_t s = t % STAGES, parity = t / STAGES & 1;
    // The tile has landed.
    if (V != Ring::NoWait) wait_for(full + 8 * s, V == Ring::ConsumerParity ? parity ^ 1 : parity);  // [ring wait full]
    const uint32_t* tile = words(s * TILE_BYTES);
    for (uint32_t i = threadIdx.x - 32; i < TILE_BYTES / 4; i += CONSUMERS) sum += tile[i];  // [ring read]
    // This thread has read its part of the tile.
    ptx::mbarrier_arrive(empty + 8 * s);
  }
  p.out[threadIdx.x - 32] = sum;
}

// A swizzled tile as it lies in shared memory, from row -3 and column 8 on: outside of the tensor on both sides.
__global__ void dump(const __grid_constant__ HopperParams p) {
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared()), full = shared + TILE_BYTES;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, TILE_BYTES);
    ptx::cp_async_bulk_tensor_4d(shared, &p.map, full, 8, -3, 0, 0);
  }
  // The mbarrier is there for everyone.
  ptx::barrier_cta();
  wait_for(full, 0);
  for (uint32_t i = threadIdx.x; i < TILE_BYTES / 4; i += 128) p.out[i] = words(0)[i];
}

enum class Product {
  Correct, NoProxyFence, NoFence, NoWait, NoCommit, WriteInFlight, ExitInFlight, Unaligned
};

// Plain stores of a tile, its product with itself transposed.
template <Product V>
__global__ void stored(const __grid_constant__ HopperParams p) {
  constexpr uint32_t SHIFT = V == Product::Unaligned ? 128 : 0;
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared()) + SHIFT;
  for (uint32_t i = threadIdx.x; i < TILE_BYTES / 4; i += 128) {
    const uint32_t place = chunk_place(i / 32, i % 32 / 4) + i % 4 * 4;
    words(place + SHIFT)[0] = p.in[i];  // [stored write]
  }
  // This thread's stores are visible to wgmma.
  if (V != Product::NoProxyFence) ptx::fence_proxy_async_shared_cta();
  // And everyone's.
  ptx::barrier_cta();
  float d[8][4] = {};
  if (V != Product::NoFence) ptx::wgmma_fence();
  for (int step = 0; step < 4; step++) {
    const uint64_t tile = descriptor(shared + step * 32);
    ptx::wgmma_m64nNk16(ptx::F16(), d, tile, tile, step > 0);  // [stored wgmma]
  }
  if (V != Product::NoCommit) ptx::wgmma_commit_group();
  if (V == Product::WriteInFlight) words(threadIdx.x * 64)[0] = 0;  // [stored overwrite]
  if (V == Product::ExitInFlight) return;
  if (V != Product::NoWait) ptx::wgmma_wait_group<0>();
  for (int i = 0; i < 32; i++) p.out[threadIdx.x * 32 + i] = uint32_t(int(d[i / 4][i % 4]));  // [stored use]
}

// A bulk copy over what was stored plainly.
template <bool FENCE>
__global__ void store_then_bulk(const __grid_constant__ HopperParams p) {
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared()), full = shared + TILE_BYTES;
  words(threadIdx.x * 4)[0] = 7;  // [store_then_bulk write]
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  if (FENCE) ptx::fence_proxy_async_shared_cta();
  // The stores are done, the mbarrier is there.
  ptx::barrier_cta();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(full, TILE_BYTES);
    ptx::cp_async_bulk_tensor_4d(shared, &p.map, full, 0, 0, 0, 0);  // [store_then_bulk issue]
  }
  wait_for(full, 0);
  p.out[threadIdx.x] = words(threadIdx.x * 4)[0];
}

enum class Store { Correct, NoProxyFence, NoBarrier, NoCommit, NoWait, Overwrite, Foreign, Unaligned };

// A tile of plain stores, swizzled, to rows 3 to 66 of the tensor from column 8 on, and another one after it, from the same
// place.
template <Store V, int TILES = 2>
__global__ void bulk_store(const __grid_constant__ HopperParams p) {
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared()) + (V == Store::Unaligned ? 128 : 0);
  for (int tile = 0; tile < TILES; tile++) {
    for (uint32_t i = threadIdx.x; i < TILE_BYTES / 4; i += 128) {
      words(chunk_place(i / 32, i % 32 / 4) + i % 4 * 4)[0] = p.in[tile * 2048 + i];  // [bulk_store write]
    }
    // This thread's stores are visible to the copy,
    if (V != Store::NoProxyFence) ptx::fence_proxy_async_shared_cta();
    // and everyone's.
    if (V != Store::NoBarrier) ptx::barrier_cta();
    if (threadIdx.x == 0) {
      ptx::cp_async_bulk_tensor_store_4d(&p.map, shared, 8, 3 + 100 * tile, V == Store::Foreign ? 1 : 0, 0);  // [bulk_store issue]
      if (V != Store::NoCommit) ptx::cp_async_bulk_commit_group();
      if (V == Store::Overwrite) words(256)[0] = 0;  // [bulk_store overwrite]
      if (V != Store::NoWait) ptx::cp_async_bulk_wait_group_read<0>();
    }
    // The tile has been read.
    ptx::barrier_cta();
  }
}

// 256 threads: one warpgroup gives registers, the other takes them.
template <bool GIVE>
__global__ void registers(const __grid_constant__ HopperParams p) {
  if (threadIdx.x >= 128) ptx::setmaxnreg_inc<248>();  // [registers inc]
  else if (GIVE) ptx::setmaxnreg_dec<24>();
  p.out[threadIdx.x] = 1;
}

enum class Misuse { None, OneMore, PlainRead, PlainWrite, InitTwice, ExitInFlight };

// One thread, one mbarrier for two arrivals.
template <Misuse V>
__global__ void misuse(const __grid_constant__ HopperParams p) {
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared()), barrier = shared + TILE_BYTES;
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(barrier, 2);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(barrier, TILE_BYTES);
  ptx::mbarrier_arrive(barrier);
  if (V == Misuse::OneMore) ptx::mbarrier_arrive(barrier);  // [misuse arrive]
  uint32_t found = 0;
  if (V == Misuse::PlainRead) found = words(TILE_BYTES)[0];  // [misuse read]
  if (V == Misuse::PlainWrite) words(TILE_BYTES)[1] = 0;  // [misuse write]
  if (V == Misuse::InitTwice) ptx::mbarrier_init(barrier, 1);  // [misuse init]
  ptx::cp_async_bulk_tensor_4d(shared, &p.map, barrier, 0, 0, 0, 0);  // [misuse issue]
  if (V != Misuse::ExitInFlight) wait_for(barrier, 0);
  p.out[0] = found;
}

template <uint32_t FIRST, uint32_t SECOND>
__global__ void register_counts(const __grid_constant__ HopperParams p) {
  ptx::setmaxnreg_dec<FIRST>();
  ptx::setmaxnreg_dec<SECOND>();  // [register_counts]
  p.out[threadIdx.x] = 1;
}

}  // namespace

extern "C" {
void misuse_none(const void* p) { simt::entry<misuse<Misuse::None>>(p); }
void misuse_one_more(const void* p) { simt::entry<misuse<Misuse::OneMore>>(p); }
void misuse_plain_read(const void* p) { simt::entry<misuse<Misuse::PlainRead>>(p); }
void misuse_plain_write(const void* p) { simt::entry<misuse<Misuse::PlainWrite>>(p); }
void misuse_init_twice(const void* p) { simt::entry<misuse<Misuse::InitTwice>>(p); }
void misuse_exit_in_flight(const void* p) { simt::entry<misuse<Misuse::ExitInFlight>>(p); }
void register_counts_falling(const void* p) { simt::entry<register_counts<64, 24>>(p); }
void register_counts_rising(const void* p) { simt::entry<register_counts<64, 72>>(p); }
void register_counts_odd(const void* p) { simt::entry<register_counts<64, 28>>(p); }
void ring_correct(const void* p) { simt::entry<ring<Ring::Correct>>(p); }
void ring_no_init_barrier(const void* p) { simt::entry<ring<Ring::NoInitBarrier>>(p); }
void ring_no_init_fence(const void* p) { simt::entry<ring<Ring::NoInitFence>>(p); }
void ring_wrong_count(const void* p) { simt::entry<ring<Ring::WrongCount>>(p); }
void ring_producer_parity(const void* p) { simt::entry<ring<Ring::ProducerParity>>(p); }
void ring_consumer_parity(const void* p) { simt::entry<ring<Ring::ConsumerParity>>(p); }
void ring_too_many_bytes(const void* p) { simt::entry<ring<Ring::TooManyBytes>>(p); }
void ring_too_few_bytes(const void* p) { simt::entry<ring<Ring::TooFewBytes>>(p); }
void ring_no_wait(const void* p) { simt::entry<ring<Ring::NoWait>>(p); }
void dump_tile(const void* p) { simt::entry<dump>(p); }
void stored_correct(const void* p) { simt::entry<stored<Product::Correct>>(p); }
void stored_no_proxy_fence(const void* p) { simt::entry<stored<Product::NoProxyFence>>(p); }
void stored_no_fence(const void* p) { simt::entry<stored<Product::NoFence>>(p); }
void stored_no_wait(const void* p) { simt::entry<stored<Product::NoWait>>(p); }
void stored_no_commit(const void* p) { simt::entry<stored<Product::NoCommit>>(p); }
void stored_write_in_flight(const void* p) { simt::entry<stored<Product::WriteInFlight>>(p); }
void stored_exit_in_flight(const void* p) { simt::entry<stored<Product::ExitInFlight>>(p); }
void stored_unaligned(const void* p) { simt::entry<stored<Product::Unaligned>>(p); }
void store_then_bulk_correct(const void* p) { simt::entry<store_then_bulk<true>>(p); }
void store_then_bulk_no_fence(const void* p) { simt::entry<store_then_bulk<false>>(p); }
void bulk_store_correct(const void* p) { simt::entry<bulk_store<Store::Correct>>(p); }
void bulk_store_no_proxy_fence(const void* p) { simt::entry<bulk_store<Store::NoProxyFence>>(p); }
void bulk_store_no_barrier(const void* p) { simt::entry<bulk_store<Store::NoBarrier>>(p); }
void bulk_store_no_commit(const void* p) { simt::entry<bulk_store<Store::NoCommit>>(p); }
void bulk_store_no_wait(const void* p) { simt::entry<bulk_store<Store::NoWait>>(p); }
void bulk_store_overwrite(const void* p) { simt::entry<bulk_store<Store::Overwrite>>(p); }
void bulk_store_foreign(const void* p) { simt::entry<bulk_store<Store::Foreign>>(p); }
void bulk_store_unaligned(const void* p) { simt::entry<bulk_store<Store::Unaligned>>(p); }
void bulk_store_once_no_wait(const void* p) { simt::entry<bulk_store<Store::NoWait, 1>>(p); }
void bulk_store_once_no_commit(const void* p) { simt::entry<bulk_store<Store::NoCommit, 1>>(p); }
void registers_given(const void* p) { simt::entry<registers<true>>(p); }
void registers_kept(const void* p) { simt::entry<registers<false>>(p); }
}
