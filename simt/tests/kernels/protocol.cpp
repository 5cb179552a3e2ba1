// One kernel per rule of synchronisation, right and with the one mistake its name says. Blocks of 128 threads unless a
// test says otherwise. Tests find the lines by the words in brackets.
#include "buffers.h"
#include "simt/entry.hpp"

namespace {

__device__ __forceinline__ uint32_t* shared_words() { return reinterpret_cast<uint32_t*>(ptx::dynamic_shared()); }

// Threads of different warps exchange a word.
template <bool BARRIER>
__global__ void exchange(Buffers p) {
  uint32_t* s = shared_words();
  s[threadIdx.x] = 0;
  // Everything is written once, so that what follows is a matter of order only.
  ptx::barrier_cta();
  s[threadIdx.x] = p.in[threadIdx.x];  // [exchange write]
  // Each word is written; its reader is in another warp.
  if (BARRIER) ptx::barrier_cta();
  p.out[threadIdx.x] = s[threadIdx.x ^ 32];  // [exchange read]
}

// The same words again in the next round.
template <bool SECOND_BARRIER>
__global__ void rounds(Buffers p) {
  uint32_t* s = shared_words();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 3; round++) {
    s[threadIdx.x] = p.in[threadIdx.x] + round;  // [rounds write]
    // All words of the round are written, and are read next.
    ptx::barrier_cta();
    sum += s[threadIdx.x ^ 64];  // [rounds read]
    // All have read the round's words; the next round overwrites them.
    if (SECOND_BARRIER) ptx::barrier_cta();
  }
  p.out[threadIdx.x] = sum;
}

// Lanes of one warp: a shuffle brings them together, but orders no memory.
template <bool WARP_BARRIER>
__global__ void within_warp(Buffers p) {
  uint32_t* s = shared_words();
  s[threadIdx.x] = p.in[threadIdx.x];  // [within_warp write]
  const float one = ptx::shfl_bfly_f32(1.0f, 1);
  // Each lane's word is written, and is read by its neighbour.
  if (WARP_BARRIER) ptx::bar_warp_sync();
  p.out[threadIdx.x] = s[threadIdx.x ^ 1] * uint32_t(one);  // [within_warp read]
}

// Two lanes of a warp read a word that one of them then overwrites: the other's read must not be forgotten.
template <bool WARP_BARRIER>
__global__ void two_readers(Buffers p) {
  uint32_t* s = shared_words();
  if (threadIdx.x == 0) s[0] = p.in[0];
  // The word is written, and is read by everyone.
  ptx::barrier_cta();
  uint32_t sum = threadIdx.x < 2 ? s[0] : 0;  // [two_readers read]
  // Both have read; lane 1 overwrites.
  if (WARP_BARRIER) ptx::bar_warp_sync();
  if (threadIdx.x == 1) s[0] = 7;  // [two_readers write]
  p.out[threadIdx.x] = sum;
}

// ldmatrix hands every lane something of every row: rows written by other lanes need more than their own lane's order.
template <bool WARP_BARRIER>
__global__ void store_then_ldmatrix(Buffers p) {
  const int lane = threadIdx.x % 32;
  uint32_t* row = shared_words() + threadIdx.x * 4;
  for (int i = 0; i < 4; i++) row[i] = p.in[lane * 4 + i];  // [store_then_ldmatrix write]
  // Each lane's row is written; the warp reads all 32.
  if (WARP_BARRIER) ptx::bar_warp_sync();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(row));  // [store_then_ldmatrix read]
  for (int i = 0; i < 4; i++) p.out[threadIdx.x * 4 + i] = r[i];
}

enum class Copy { Correct, NoWait, NoCommit, NoBarrier, EarlyWrite };

template <Copy V>
__global__ void copy(Buffers p) {
  for (int i = 0; i < 4; i++) shared_words()[threadIdx.x * 4 + i] = 0;
  // Everything is written once, so that what follows is a matter of order only.
  ptx::barrier_cta();
  const uint32_t mine = ptx::shared_address(shared_words() + threadIdx.x * 4);
  ptx::cp_async_cg_16(mine, p.in + threadIdx.x * 4, 16);  // [copy issue]
  if (V != Copy::NoCommit) ptx::cp_async_commit_group();
  if (V == Copy::EarlyWrite) shared_words()[threadIdx.x * 4] = 1;  // [copy write]
  if (V != Copy::NoWait) ptx::cp_async_wait_group<0>();
  // Every thread's copy has landed; each reads another's.
  if (V != Copy::NoBarrier) ptx::barrier_cta();
  p.out[threadIdx.x] = shared_words()[(threadIdx.x ^ 32) * 4];  // [copy read]
}

template <bool WAIT>
__global__ void exit_in_flight(Buffers p) {
  const uint32_t mine = ptx::shared_address(shared_words() + threadIdx.x);
  ptx::cp_async_ca_4(mine, p.in + threadIdx.x, 4);  // [exit_in_flight issue]
  ptx::cp_async_commit_group();
  if (WAIT) ptx::cp_async_wait_group<0>();
  p.out[threadIdx.x] = 1;
}

// The two halves of a warp at two instructions.
template <bool DIVERGENT>
__global__ void divergent(Buffers p) {
  shared_words()[threadIdx.x] = threadIdx.x;
  // The words are written, and read as matrices.
  ptx::barrier_cta();
  uint32_t r[4] = {};
  float f = 0;
  const uint32_t row = ptx::shared_address(shared_words());
  if (!DIVERGENT || threadIdx.x % 32 < 16) f = ptx::shfl_bfly_f32(1.0f, 1);  // [divergent shfl]
  if (!DIVERGENT || threadIdx.x % 32 >= 16) ptx::ldmatrix_x4(r, row);  // [divergent ldmatrix]
  p.out[threadIdx.x] = r[0] + uint32_t(f);
}

template <bool EARLY>
__global__ void exit_early(Buffers p) {
  if (EARLY && threadIdx.x % 32 >= 16) return;
  p.out[threadIdx.x] = uint32_t(ptx::shfl_bfly_f32(1.0f, 1));  // [exit_early shfl]
}

template <bool SAME_COUNT>
__global__ void barrier_count(Buffers p) {
  const uint32_t warp = threadIdx.x / 32;
  // Nothing is exchanged; only the counts matter.
  if (warp < 2) ptx::bar_sync(1, SAME_COUNT || warp == 0 ? 64 : 96);  // [barrier_count]
  p.out[threadIdx.x] = 1;
}

// Two pairs of warps, each with a barrier of its own.
template <bool ALL>
__global__ void skipped_barrier(Buffers p) {
  // Nothing is exchanged; only who arrives matters.
  if (ALL || threadIdx.x < 64) ptx::barrier_cta();  // [skipped_barrier all]
  // Nothing is exchanged.
  ptx::bar_sync(1 + threadIdx.x / 64, 64);
  // Nothing is exchanged.
  if (!ALL && threadIdx.x >= 64) ptx::bar_sync(5, 96);  // [skipped_barrier some]
  p.out[threadIdx.x] = 1;
}

}  // namespace

extern "C" {
void exchange_correct(const void* p) { simt::entry<exchange<true>>(p); }
void exchange_no_barrier(const void* p) { simt::entry<exchange<false>>(p); }
void rounds_correct(const void* p) { simt::entry<rounds<true>>(p); }
void rounds_no_second_barrier(const void* p) { simt::entry<rounds<false>>(p); }
void within_warp_correct(const void* p) { simt::entry<within_warp<true>>(p); }
void within_warp_shuffle_only(const void* p) { simt::entry<within_warp<false>>(p); }
void two_readers_correct(const void* p) { simt::entry<two_readers<true>>(p); }
void two_readers_no_barrier(const void* p) { simt::entry<two_readers<false>>(p); }
void store_then_ldmatrix_correct(const void* p) { simt::entry<store_then_ldmatrix<true>>(p); }
void store_then_ldmatrix_no_barrier(const void* p) { simt::entry<store_then_ldmatrix<false>>(p); }
void copy_correct(const void* p) { simt::entry<copy<Copy::Correct>>(p); }
void copy_no_wait(const void* p) { simt::entry<copy<Copy::NoWait>>(p); }
void copy_no_commit(const void* p) { simt::entry<copy<Copy::NoCommit>>(p); }
void copy_no_barrier(const void* p) { simt::entry<copy<Copy::NoBarrier>>(p); }
void copy_early_write(const void* p) { simt::entry<copy<Copy::EarlyWrite>>(p); }
void exit_after_wait(const void* p) { simt::entry<exit_in_flight<true>>(p); }
void exit_without_wait(const void* p) { simt::entry<exit_in_flight<false>>(p); }
void divergent_correct(const void* p) { simt::entry<divergent<false>>(p); }
void divergent_halves(const void* p) { simt::entry<divergent<true>>(p); }
void exit_early_correct(const void* p) { simt::entry<exit_early<false>>(p); }
void exit_early_half(const void* p) { simt::entry<exit_early<true>>(p); }
void barrier_count_same(const void* p) { simt::entry<barrier_count<true>>(p); }
void barrier_count_mismatch(const void* p) { simt::entry<barrier_count<false>>(p); }
void skipped_barrier_none(const void* p) { simt::entry<skipped_barrier<true>>(p); }
void skipped_barrier_half(const void* p) { simt::entry<skipped_barrier<false>>(p); }
}
