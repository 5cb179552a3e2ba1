// Each primitive once, on inputs that the test chooses and with every result written out. One block; one warp unless said.
//
// Compiled for the emulator (primitives.cpp) and by nvcc (tests/conformance.rs): both must write the same bits.
#pragma once
#include "buffers.h"

template <bool TRANSPOSED>
__device__ void ldmatrix(Buffers p) {
  uint32_t* s = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  for (int i = 0; i < 4; i++) s[threadIdx.x * 4 + i] = p.in[threadIdx.x * 4 + i];
  // 32 rows are written, and read as four matrices.
  ptx::barrier_cta();
  const uint32_t row = ptx::shared_address(s + threadIdx.x * 4);
  uint32_t four[4], two[2];
  if (TRANSPOSED) {
    ptx::ldmatrix_x4_trans(four, row);
    ptx::ldmatrix_x2_trans(two, row);
  } else {
    ptx::ldmatrix_x4(four, row);
    ptx::ldmatrix_x2(two, row);
  }
  for (int i = 0; i < 4; i++) p.out[threadIdx.x * 6 + i] = four[i];
  for (int i = 0; i < 2; i++) p.out[threadIdx.x * 6 + 4 + i] = two[i];
}

// in: per lane 4 words of a, 2 of b, 4 of d (as f32 bits). out: 4 words of d after k16, 4 after k8.
template <class Element>
__device__ void mma(Buffers p) {
  const uint32_t* in = p.in + threadIdx.x * 10;
  uint32_t* out = p.out + threadIdx.x * 8;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, a8[2] = {in[0], in[1]};
  float d[4], d8[4];
  for (int i = 0; i < 4; i++) d[i] = d8[i] = reinterpret_cast<const float*>(in)[6 + i];
  ptx::mma_m16n8k16(Element{}, d, a, in[4], in[5]);
  ptx::mma_m16n8k8(Element{}, d8, a8, in[4]);
  for (int i = 0; i < 4; i++) reinterpret_cast<float*>(out)[i] = d[i];
  for (int i = 0; i < 4; i++) reinterpret_cast<float*>(out)[4 + i] = d8[i];
}

// in: one f32 per lane.
__device__ void exchange_lanes(Buffers p) {
  const float x = reinterpret_cast<const float*>(p.in)[threadIdx.x];
  auto* out = reinterpret_cast<float*>(p.out);
  out[threadIdx.x] = ptx::shfl_bfly_f32(x, 1);
  out[32 + threadIdx.x] = ptx::shfl_bfly_f32(x, 16);
  out[64 + threadIdx.x] = ptx::shfl_idx_f32(x, threadIdx.x * 7);
  p.out[96 + threadIdx.x] = ptx::shfl_idx_b32(p.in[threadIdx.x], threadIdx.x * 3);
}

// in: pairs of f32 (hi, lo).
__device__ void convert(Buffers p) {
  const auto* in = reinterpret_cast<const float*>(p.in) + threadIdx.x * 2;
  uint32_t* out = p.out + threadIdx.x * 4;
  out[0] = ptx::cvt_rn_f16x2_f32(in[0], in[1]);
  out[1] = ptx::cvt_rn_bf16x2_f32(in[0], in[1]);
  auto* wide = reinterpret_cast<float*>(out);
  wide[2] = ptx::cvt_f32_f16(uint16_t(out[0]));
  wide[3] = ptx::cvt_f32_bf16(uint16_t(out[1] >> 16));
}

// in: one f32 per lane.
__device__ void power(Buffers p) {
  const float x = reinterpret_cast<const float*>(p.in)[threadIdx.x];
  auto* out = reinterpret_cast<float*>(p.out);
  out[threadIdx.x] = ptx::ex2_approx_ftz_f32(x);
  out[32 + threadIdx.x] = ptx::lg2_approx_ftz_f32(x);
  out[64 + threadIdx.x] = ptx::rcp_approx_ftz_f32(x);
}

// in: one f32 per lane.
__device__ void arithmetic(Buffers p) {
  const auto* in = reinterpret_cast<const float*>(p.in);
  const float x = in[threadIdx.x], y = in[threadIdx.x * 5 % 32];
  auto* out = reinterpret_cast<float*>(p.out);
  out[threadIdx.x] = ptx::max_f32(x, y);
  out[32 + threadIdx.x] = ptx::fma_rn_f32(x, y, -x);
}

// 16, 8 and 4 bytes, in three groups that land one after the other.
__device__ void copies(Buffers p) {
  uint32_t* s = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  uint32_t *sixteen = s + threadIdx.x * 4, *eight = s + 128 + threadIdx.x * 2, *four = s + 192 + threadIdx.x;
  ptx::cp_async_cg_16(ptx::shared_address(sixteen), p.in + threadIdx.x * 4, 16);
  ptx::cp_async_commit_group();
  ptx::cp_async_ca_8(ptx::shared_address(eight), p.in + threadIdx.x * 2, 6);
  ptx::cp_async_commit_group();
  ptx::cp_async_ca_4(ptx::shared_address(four), p.in + threadIdx.x, 4);
  ptx::cp_async_commit_group();
  uint32_t* out = p.out + threadIdx.x * 7;
  ptx::cp_async_wait_group<2>();
  for (int i = 0; i < 4; i++) out[i] = sixteen[i];
  ptx::cp_async_wait_group<1>();
  for (int i = 0; i < 2; i++) out[4 + i] = eight[i];
  ptx::cp_async_wait_group<0>();
  out[6] = four[0];
}

// CUDA's own words, in a grid of several dimensions.
__device__ void indices(Buffers p) {
  const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  p.out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      threadIdx.x | threadIdx.y << 4 | threadIdx.z << 8 | blockIdx.x << 12 | blockIdx.y << 16 | blockIdx.z << 20;
}

// in: one word a thread, 64 threads. Half the block meets at a barrier of its own, the warps at theirs, then all.
__device__ void synchronise(Buffers p) {
  uint32_t* s = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  const uint32_t t = threadIdx.x;
  s[t] = p.in[t];
  ptx::bar_warp_sync();
  const uint32_t neighbour = s[t ^ 1];
  ptx::bar_sync(3, 64);
  const uint32_t opposite = s[t ^ 32];
  // Read: by every thread. Written next: by every thread.
  ptx::barrier_cta();
  s[t] = neighbour + 3 * opposite;
  ptx::barrier_cta();
  p.out[t] = s[63 - t];
}

// in: a word for each of 64 threads; out: 64 words, zeros at first, then two sums.
__device__ void atomics(Buffers p) {
  const uint32_t before = ptx::atom_add_u32(p.out + 64, p.in[threadIdx.x] & 0xff);
  ptx::red_add_f32(reinterpret_cast<float*>(p.out + 65), float(p.in[threadIdx.x] & 0xff));
  ptx::fence_acq_rel_gpu();
  // The order is the machine's: what is told is whether the sum before was one that this word can follow.
  p.out[threadIdx.x] = before + (p.in[threadIdx.x] & 0xff) <= 64 * 0xff;
}
