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

PTX_FUNCTION void cp_async_bulk_tensor_store_4d(const TensorMap* map, uint32_t src, int32_t c0, int32_t c1, int32_t c2,
                                                int32_t c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
PTX_FUNCTION void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int N>
PTX_FUNCTION void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

PTX_FUNCTION void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_FUNCTION void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
PTX_FUNCTION void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Accumulators of N columns, N / 2 a thread: as operands, and by their numbers in the text.
#define PTX_TILE(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PTX_ACCUMULATORS_40 PTX_TILE(0), PTX_TILE(1), PTX_TILE(2), PTX_TILE(3), PTX_TILE(4)
#define PTX_NUMBERS_40 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define PTX_ACCUMULATORS_64 PTX_ACCUMULATORS_40, PTX_TILE(5), PTX_TILE(6), PTX_TILE(7)
#define PTX_NUMBERS_64 PTX_NUMBERS_40 \
  ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_ACCUMULATORS_80 PTX_ACCUMULATORS_64, PTX_TILE(8), PTX_TILE(9)
#define PTX_NUMBERS_80 PTX_NUMBERS_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PTX_ACCUMULATORS_96 PTX_ACCUMULATORS_80, PTX_TILE(10), PTX_TILE(11)
#define PTX_NUMBERS_96 PTX_NUMBERS_80 \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PTX_ACCUMULATORS_112 PTX_ACCUMULATORS_96, PTX_TILE(12), PTX_TILE(13)
#define PTX_NUMBERS_112 PTX_NUMBERS_96 \
  ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PTX_ACCUMULATORS_128 PTX_ACCUMULATORS_112, PTX_TILE(14), PTX_TILE(15)
#define PTX_NUMBERS_128 PTX_NUMBERS_112 \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_ACCUMULATORS_144 PTX_ACCUMULATORS_128, PTX_TILE(16), PTX_TILE(17)
#define PTX_NUMBERS_144 PTX_NUMBERS_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PTX_ACCUMULATORS_160 PTX_ACCUMULATORS_144, PTX_TILE(18), PTX_TILE(19)
#define PTX_NUMBERS_160 PTX_NUMBERS_144 \
  ", %72, %73, %74, %75, %76, %77, %78, %79"
#define PTX_ACCUMULATORS_176 PTX_ACCUMULATORS_160, PTX_TILE(20), PTX_TILE(21)
#define PTX_NUMBERS_176 PTX_NUMBERS_160 \
  ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PTX_ACCUMULATORS_256 PTX_ACCUMULATORS_176, PTX_TILE(22), PTX_TILE(23), PTX_TILE(24), PTX_TILE(25), \
  PTX_TILE(26), PTX_TILE(27), PTX_TILE(28), PTX_TILE(29), PTX_TILE(30), PTX_TILE(31)
#define PTX_NUMBERS_256 PTX_NUMBERS_176 \
  ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"

// One N: its numbers, and those of the operands behind them: A in registers, B, accumulate; or A, B, accumulate. The immediates
// are the signs of both operands, then which of those in shared memory is MN-major.
#define PTX_TEXT(x) #x
#define PTX_WGMMA(N, ELEMENT, TYPE, P0, P1, P2, P3, P4, P5)                                                            \
  template <>                                                                                                          \
  PTX_FUNCTION void wgmma_m64nNk16<N / 8>(ELEMENT, float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {     \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #P2 ", 0; wgmma.mma_async.sync.aligned.m64n" PTX_TEXT(N)       \
                 "k16.f32." TYPE "." TYPE " {" PTX_NUMBERS_##N "}, %" #P0 ", %" #P1 ", add, 1, 1, 0, 0; }"             \
                 : PTX_ACCUMULATORS_##N                                                                                \
                 : "l"(a), "l"(b), "r"(uint32_t(accumulate))                                                           \
                 : "memory");                                                                                          \
  }                                                                                                                    \
  template <>                                                                                                          \
  PTX_FUNCTION void wgmma_m64nNk16<N / 8>(ELEMENT, float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,            \
                                          bool accumulate) {                                                           \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #P5 ", 0; wgmma.mma_async.sync.aligned.m64n" PTX_TEXT(N)       \
                 "k16.f32." TYPE "." TYPE " {" PTX_NUMBERS_##N "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4    \
                 ", add, 1, 1, 1; }"                                                                                   \
                 : PTX_ACCUMULATORS_##N                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(accumulate))                       \
                 : "memory");                                                                                          \
  }
#define PTX_WGMMA_BOTH(N, P0, P1, P2, P3, P4, P5)          \
  PTX_WGMMA(N, F16, "f16", P0, P1, P2, P3, P4, P5)         \
  PTX_WGMMA(N, BF16, "bf16", P0, P1, P2, P3, P4, P5)

PTX_WGMMA_BOTH(40, 20, 21, 22, 23, 24, 25)
PTX_WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37)
PTX_WGMMA_BOTH(80, 40, 41, 42, 43, 44, 45)
PTX_WGMMA_BOTH(96, 48, 49, 50, 51, 52, 53)
PTX_WGMMA_BOTH(112, 56, 57, 58, 59, 60, 61)
PTX_WGMMA_BOTH(128, 64, 65, 66, 67, 68, 69)
PTX_WGMMA_BOTH(144, 72, 73, 74, 75, 76, 77)
PTX_WGMMA_BOTH(160, 80, 81, 82, 83, 84, 85)
PTX_WGMMA_BOTH(176, 88, 89, 90, 91, 92, 93)
PTX_WGMMA_BOTH(256, 128, 129, 130, 131, 132, 133)

#undef PTX_TILE
#undef PTX_TEXT
#undef PTX_WGMMA
#undef PTX_WGMMA_BOTH

}  // namespace ptx
