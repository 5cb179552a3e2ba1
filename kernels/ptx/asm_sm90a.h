// The primitives of contract.h that only sm_90a has, for nvcc: one instruction each, as in asm.h. Predicates cannot be
// operands of `asm`, so they are made and read in place.
#pragma once

namespace ptx {

PTX_FUNCTION bool elect_sync() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

template <uint32_t R>
PTX_FUNCTION void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <uint32_t R>
PTX_FUNCTION void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

PTX_FUNCTION void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
PTX_FUNCTION void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX_FUNCTION void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
PTX_FUNCTION void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
PTX_FUNCTION bool mbarrier_try_wait_parity(uint32_t barrier, uint32_t parity) {
  uint32_t completed;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(completed) : "r"(barrier), "r"(parity) : "memory");
  return completed != 0;
}

PTX_FUNCTION void fence_proxy_async_shared_cta() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

PTX_FUNCTION void cp_async_bulk_tensor_4d(uint32_t dst, const TensorMap* map, uint32_t barrier, int32_t c0, int32_t c1,
                                          int32_t c2, int32_t c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(dst), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

PTX_FUNCTION void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_FUNCTION void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
PTX_FUNCTION void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define PTX_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PTX_WGMMA_ACCUMULATORS                                                                                         \
  PTX_FOUR(0), PTX_FOUR(4), PTX_FOUR(8), PTX_FOUR(12), PTX_FOUR(16), PTX_FOUR(20), PTX_FOUR(24), PTX_FOUR(28)
#define PTX_WGMMA_REGISTERS                                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                            \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

// The immediates: both operands with their sign, then which of those in shared memory is MN-major.
PTX_FUNCTION void wgmma_m64n64k16(F16, float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " PTX_WGMMA_REGISTERS
               ", %32, %33, add, 1, 1, 0, 0; }"
               : PTX_WGMMA_ACCUMULATORS
               : "l"(a), "l"(b), "r"(uint32_t(accumulate))
               : "memory");
}
PTX_FUNCTION void wgmma_m64n64k16(BF16, float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PTX_WGMMA_REGISTERS
               ", %32, %33, add, 1, 1, 0, 0; }"
               : PTX_WGMMA_ACCUMULATORS
               : "l"(a), "l"(b), "r"(uint32_t(accumulate))
               : "memory");
}
PTX_FUNCTION void wgmma_m64n64k16(F16, float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " PTX_WGMMA_REGISTERS
               ", {%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
               : PTX_WGMMA_ACCUMULATORS
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(accumulate))
               : "memory");
}
PTX_FUNCTION void wgmma_m64n64k16(BF16, float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PTX_WGMMA_REGISTERS
               ", {%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
               : PTX_WGMMA_ACCUMULATORS
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(accumulate))
               : "memory");
}

#undef PTX_FOUR
#undef PTX_WGMMA_ACCUMULATORS
#undef PTX_WGMMA_REGISTERS

}  // namespace ptx
