// The primitives of contract.h for nvcc: one `asm volatile` each and no logic, so that nothing is left to test here but
// operand order and constraints (which the PTX rung of the test ladder executes).
// Whatever touches or orders memory carries the "memory" clobber: the compiler must not move plain accesses across it.
#pragma once

namespace ptx {

PTX_FUNCTION char* dynamic_shared() {
  extern __shared__ __align__(1024) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

PTX_FUNCTION uint32_t shared_address(const void* pointer) {
  uint32_t address;
  asm volatile("{ .reg .u64 window; cvta.to.shared.u64 window, %1; cvt.u32.u64 %0, window; }"
               : "=r"(address) : "l"(pointer));
  return address;
}

PTX_FUNCTION void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row_address) : "memory");
}
PTX_FUNCTION void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row_address) : "memory");
}
PTX_FUNCTION void ldmatrix_x2(uint32_t (&r)[2], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(row_address) : "memory");
}
PTX_FUNCTION void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(row_address) : "memory");
}

PTX_FUNCTION void mma_m16n8k16(F16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PTX_FUNCTION void mma_m16n8k16(BF16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PTX_FUNCTION void mma_m16n8k8(F16, float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
PTX_FUNCTION void mma_m16n8k8(BF16, float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}

PTX_FUNCTION float shfl_bfly_f32(float value, uint32_t lane_mask) {
  float result;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(result) : "f"(value), "r"(lane_mask));
  return result;
}
PTX_FUNCTION float shfl_idx_f32(float value, uint32_t source_lane) {
  float result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(result) : "f"(value), "r"(source_lane));
  return result;
}

PTX_FUNCTION uint32_t shfl_idx_b32(uint32_t value, uint32_t source_lane) {
  uint32_t result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(result) : "r"(value), "r"(source_lane));
  return result;
}

PTX_FUNCTION float ex2_approx_ftz_f32(float x) {
  float result;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
PTX_FUNCTION float lg2_approx_ftz_f32(float x) {
  float result;
  asm volatile("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

PTX_FUNCTION float rcp_approx_ftz_f32(float x) {
  float result;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
PTX_FUNCTION float max_f32(float a, float b) {
  float result;
  asm volatile("max.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
PTX_FUNCTION float fma_rn_f32(float a, float b, float c) {
  float result;
  asm volatile("fma.rn.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
}

PTX_FUNCTION uint32_t cvt_rn_f16x2_f32(float hi, float lo) {
  uint32_t result;
  asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(hi), "f"(lo));
  return result;
}
PTX_FUNCTION uint32_t cvt_rn_bf16x2_f32(float hi, float lo) {
  uint32_t result;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(hi), "f"(lo));
  return result;
}
PTX_FUNCTION float cvt_f32_f16(uint16_t bits) {
  float result;
  asm volatile("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}
PTX_FUNCTION float cvt_f32_bf16(uint16_t bits) {
  float result;
  asm volatile("mov.b32 %0, {%1, %2};" : "=f"(result) : "h"(uint16_t(0)), "h"(bits));
  return result;
}

PTX_FUNCTION void cp_async_cg_16(uint32_t dst, const void* src, uint32_t src_size) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_size) : "memory");
}
PTX_FUNCTION void cp_async_ca_8(uint32_t dst, const void* src, uint32_t src_size) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(src_size) : "memory");
}
PTX_FUNCTION void cp_async_ca_4(uint32_t dst, const void* src, uint32_t src_size) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(src_size) : "memory");
}
PTX_FUNCTION void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
PTX_FUNCTION void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

PTX_FUNCTION void bar_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PTX_FUNCTION void barrier_cta() { asm volatile("bar.sync 0;" ::: "memory"); }
PTX_FUNCTION void bar_warp_sync() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

PTX_FUNCTION void red_add_f32(float* address, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}
PTX_FUNCTION uint32_t atom_add_u32(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}
PTX_FUNCTION void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace ptx

// The set that only sm_90a assembles. A compilation for another architecture has it declared, and must not call it.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "asm_sm90a.h"
#endif
