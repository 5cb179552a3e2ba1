// One kernel per rule of memory, right and with the one mistake its name says. Blocks of 128 threads.
// Tests find the lines by the words in brackets.
#include "buffers.h"
#include "simt/entry.hpp"

namespace {

__device__ __forceinline__ uint32_t* shared_words() { return reinterpret_cast<uint32_t*>(ptx::dynamic_shared()); }

template <bool WRITTEN>
__global__ void uninitialised(Buffers p) {
  if (WRITTEN) shared_words()[threadIdx.x] = 5;
  p.out[threadIdx.x] = shared_words()[threadIdx.x];  // [uninitialised read]
}

// `in` may point one element too far; the launch decides how large the buffers are.
__global__ void global_copy(Buffers p) {
  p.out[threadIdx.x] =    // [global write]
      p.in[threadIdx.x];  // [global read]
}

__global__ void write_input(Buffers p) {
  const_cast<uint32_t*>(p.in)[threadIdx.x] = 1;  // [write_input]
}

// The launch decides how much shared memory there is.
__global__ void shared_store(Buffers p) {
  shared_words()[threadIdx.x] = 1;  // [shared_store write]
  p.out[threadIdx.x] = shared_words()[threadIdx.x];
}

template <int OFFSET>
__global__ void shared_window(Buffers p) {
  if (threadIdx.x != 127) return;
  ptx::cp_async_cg_16(ptx::shared_address(shared_words() + threadIdx.x * 4) + OFFSET, p.in, 16);  // [shared_window]
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
}

enum class Aligned { Correct, Ldmatrix, Destination, Source, Plain };

template <Aligned V>
__global__ void alignment(Buffers p) {
  const uint32_t row = ptx::shared_address(shared_words() + threadIdx.x * 4);
  const int destination = V == Aligned::Destination ? 8 : 0, source = V == Aligned::Source ? 1 : 0;
  ptx::cp_async_cg_16(row + destination, p.in + threadIdx.x * 4 + source, 16);  // [alignment copy]
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  // The rows are there, and are read as matrices.
  ptx::barrier_cta();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, row + (V == Aligned::Ldmatrix ? 4 : 0));  // [alignment ldmatrix]
  const char* bytes = ptx::dynamic_shared() + (V == Aligned::Plain ? 2 : 0);
  p.out[threadIdx.x] = r[0] + *reinterpret_cast<const uint32_t*>(bytes);  // [alignment plain]
}

// Reads 16 bytes per thread, the last of them in part.
__global__ void copy_tail(Buffers p) {
  const uint32_t sizes[4] = {16, 10, 2, 0};
  const uint32_t* source = p.in + threadIdx.x * 4;
  const uint32_t destination = ptx::shared_address(shared_words() + threadIdx.x * 4);
  ptx::cp_async_cg_16(destination, source, sizes[threadIdx.x % 4]);  // [copy_tail]
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  for (int i = 0; i < 4; i++) p.out[threadIdx.x * 4 + i] = shared_words()[threadIdx.x * 4 + i];
}

// Overwrites the source of a copy in flight.
__global__ void late_copy(Buffers p) {
  p.out[threadIdx.x] = 1;
  ptx::cp_async_ca_4(ptx::shared_address(shared_words() + threadIdx.x), p.out + threadIdx.x, 4);
  ptx::cp_async_commit_group();
  p.out[threadIdx.x] = 2;
  ptx::cp_async_wait_group<0>();
  p.out[128 + threadIdx.x] = shared_words()[threadIdx.x];
}

// A pointer to a local variable, passed through shared memory.
template <bool OWN>
__global__ void foreign_stack(Buffers p) {
  uint32_t local = p.in[threadIdx.x];
  auto* pointers = reinterpret_cast<uint32_t**>(ptx::dynamic_shared());
  pointers[threadIdx.x] = &local;
  // Every pointer is written; each thread reads one.
  ptx::barrier_cta();
  p.out[threadIdx.x] = *pointers[OWN ? threadIdx.x : threadIdx.x ^ 1];  // [foreign_stack read]
  // Nobody leaves while its local variable is read.
  ptx::barrier_cta();
}

// All blocks add to, or overwrite, the same words.
template <bool ATOMIC>
__global__ void accumulate(Buffers p) {
  auto* out = reinterpret_cast<float*>(p.out);
  if (ATOMIC) ptx::red_add_f32(out + threadIdx.x, 1.0f);
  else out[threadIdx.x] = float(blockIdx.x);  // [accumulate write]
}

// Block 0 writes what all blocks then read.
__global__ void read_other_block(Buffers p) {
  if (blockIdx.x == 0) p.out[threadIdx.x] = 3;                                     // [read_other_block write]
  else p.out[blockDim.x * blockIdx.x + threadIdx.x] = p.out[threadIdx.x] + 1;      // [read_other_block read]
}

// Threads of one block exchange words through global memory.
template <bool BARRIER>
__global__ void through_global(Buffers p) {
  p.out[threadIdx.x] = p.in[threadIdx.x];  // [through_global write]
  // Each word is written; its reader is in another warp.
  if (BARRIER) ptx::barrier_cta();
  p.out[128 + threadIdx.x] = p.out[threadIdx.x ^ 32];  // [through_global read]
}

enum class Message { Correct, NoReleaseFence, NoAcquireFence, NoBarrier };

// Each block leaves a partial result, and the last one to finish adds them up. out[0] counts; partials from out[32] on.
template <Message V>
__global__ void last_block_sums(Buffers p) {
  p.out[32 + blockIdx.x * blockDim.x + threadIdx.x] = p.in[threadIdx.x] + blockIdx.x;  // [last_block_sums write]
  // The block's partial results are written; thread 0 publishes them.
  if (V != Message::NoBarrier) ptx::barrier_cta();
  if (threadIdx.x == 0) {
    if (V != Message::NoReleaseFence) ptx::fence_acq_rel_gpu();
    shared_words()[0] = ptx::atom_add_u32(p.out, 1);
    if (V != Message::NoAcquireFence) ptx::fence_acq_rel_gpu();
  }
  // Everyone learns whether this block is the last, and sees what thread 0 has acquired.
  ptx::barrier_cta();
  if (shared_words()[0] != gridDim.x - 1) return;
  uint32_t sum = 0;
  for (uint32_t b = 0; b < gridDim.x; b++) sum += p.out[32 + b * blockDim.x + threadIdx.x];  // [last_block_sums read]
  p.out[32 + gridDim.x * blockDim.x + threadIdx.x] = sum;
}

// Bytes of words that asynchronous copies brought, as a mask would be read.
template <bool WRITE>
__global__ void single_bytes(Buffers p) {
  ptx::cp_async_ca_4(ptx::shared_address(shared_words() + threadIdx.x), p.in + threadIdx.x, 4);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  auto* bytes = reinterpret_cast<unsigned char*>(shared_words() + threadIdx.x);
  if (WRITE) bytes[1] = 1;  // [single_bytes write]
  p.out[threadIdx.x] = bytes[0] + 256u * bytes[1];
}

// Word `threadIdx.x * STRIDE`, stored and loaded.
template <int STRIDE>
__global__ void strided(Buffers p) {
  shared_words()[threadIdx.x * STRIDE] = threadIdx.x;
  p.out[threadIdx.x] = shared_words()[threadIdx.x * STRIDE];
}

__device__ const uint32_t TABLE[8] = {3, 1, 4, 1, 5, 9, 2, 6};

__global__ void constant_table(Buffers p) {
  p.out[threadIdx.x] = TABLE[p.in[threadIdx.x] % 8];
}

__global__ void uninitialised_local(Buffers p) {
  uint32_t local[4];
  local[p.in[0]] = 1;
  p.out[threadIdx.x] = local[p.in[1]];
}

template <int WORDS>
__global__ void large_local(Buffers p) {
  uint32_t local[WORDS];
  for (int i = 0; i < WORDS; i++) local[i] = p.in[i % 4];
  p.out[threadIdx.x] = local[p.in[0] + threadIdx.x];
}

}  // namespace

extern "C" {
void uninitialised_written(const void* p) { simt::entry<uninitialised<true>>(p); }
void uninitialised_read(const void* p) { simt::entry<uninitialised<false>>(p); }
void copy_words(const void* p) { simt::entry<global_copy>(p); }
void write_to_input(const void* p) { simt::entry<write_input>(p); }
void store_shared(const void* p) { simt::entry<shared_store>(p); }
void shared_window_inside(const void* p) { simt::entry<shared_window<0>>(p); }
void shared_window_outside(const void* p) { simt::entry<shared_window<16>>(p); }
void alignment_correct(const void* p) { simt::entry<alignment<Aligned::Correct>>(p); }
void alignment_ldmatrix(const void* p) { simt::entry<alignment<Aligned::Ldmatrix>>(p); }
void alignment_destination(const void* p) { simt::entry<alignment<Aligned::Destination>>(p); }
void alignment_source(const void* p) { simt::entry<alignment<Aligned::Source>>(p); }
void alignment_plain(const void* p) { simt::entry<alignment<Aligned::Plain>>(p); }
void copy_with_tail(const void* p) { simt::entry<copy_tail>(p); }
void copy_late(const void* p) { simt::entry<late_copy>(p); }
void own_stack(const void* p) { simt::entry<foreign_stack<true>>(p); }
void other_stack(const void* p) { simt::entry<foreign_stack<false>>(p); }
void accumulate_atomically(const void* p) { simt::entry<accumulate<true>>(p); }
void accumulate_plainly(const void* p) { simt::entry<accumulate<false>>(p); }
void read_from_other_block(const void* p) { simt::entry<read_other_block>(p); }
void through_global_correct(const void* p) { simt::entry<through_global<true>>(p); }
void through_global_no_barrier(const void* p) { simt::entry<through_global<false>>(p); }
void last_block_correct(const void* p) { simt::entry<last_block_sums<Message::Correct>>(p); }
void last_block_no_release(const void* p) { simt::entry<last_block_sums<Message::NoReleaseFence>>(p); }
void last_block_no_acquire(const void* p) { simt::entry<last_block_sums<Message::NoAcquireFence>>(p); }
void last_block_no_barrier(const void* p) { simt::entry<last_block_sums<Message::NoBarrier>>(p); }
void bytes_read(const void* p) { simt::entry<single_bytes<false>>(p); }
void bytes_written(const void* p) { simt::entry<single_bytes<true>>(p); }
void stride_1(const void* p) { simt::entry<strided<1>>(p); }
void stride_2(const void* p) { simt::entry<strided<2>>(p); }
void stride_32(const void* p) { simt::entry<strided<32>>(p); }
void table(const void* p) { simt::entry<constant_table>(p); }
void local_10k_words(const void* p) { simt::entry<large_local<10000>>(p); }
void local_20k_words(const void* p) { simt::entry<large_local<20000>>(p); }
void local_uninitialised(const void* p) { simt::entry<uninitialised_local>(p); }
}
