// What contract.h needs from a host compiler: CUDA's words as ordinary C++, and the templates among the primitives.
// Declarations only. The bodies are simt/emulator/primitives_*.cpp: a kernel's translation unit is instrumented (every
// load and store is reported to the emulator), and the emulator's own code must not be.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace simt {
struct Index {
  unsigned x, y, z;
};
Index thread_index();
Index block_index();
Index block_dimensions();
Index grid_dimensions();
void cp_async_wait_group(int groups_left);
void cp_async_bulk_wait_group_read(int groups_left);
void wgmma_wait_group(int groups_left);
void wgmma(bool bf16, float* d, int tiles, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate);
void setmaxnreg_inc(uint32_t count);
void setmaxnreg_dec(uint32_t count);
}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dimensions())
#define gridDim (::simt::grid_dimensions())

namespace ptx {

// always_inline: the emulator takes the call's return address for the place in the kernel where this primitive stands.
template <int N>
__forceinline__ void cp_async_wait_group() {
  static_assert(N >= 0, "cp.async.wait_group takes a count of groups");
  ::simt::cp_async_wait_group(N);
}

template <int N>
__forceinline__ void cp_async_bulk_wait_group_read() {
  static_assert(N >= 0, "cp.async.bulk.wait_group takes a count of groups");
  ::simt::cp_async_bulk_wait_group_read(N);
}

template <int N>
__forceinline__ void wgmma_wait_group() {
  static_assert(N >= 0 && N <= 7, "wgmma.wait_group takes a count of groups");
  ::simt::wgmma_wait_group(N);
}

#define PTX_WGMMA(ELEMENT, IS_BF16)                                                                                      \
  template <int TILES>                                                                                                 \
  __forceinline__ void wgmma_m64nNk16(ELEMENT, float (&d)[TILES][4], uint64_t a, uint64_t b, bool accumulate) {         \
    static_assert(TILES >= 1 && TILES <= 32, "N is a multiple of 8 up to 256");                                        \
    ::simt::wgmma(IS_BF16, d[0], TILES, nullptr, a, b, accumulate);                                                    \
  }                                                                                                                    \
  template <int TILES>                                                                                                 \
  __forceinline__ void wgmma_m64nNk16(ELEMENT, float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b,                \
                                      bool accumulate) {                                                               \
    static_assert(TILES >= 1 && TILES <= 32, "N is a multiple of 8 up to 256");                                        \
    ::simt::wgmma(IS_BF16, d[0], TILES, a, 0, b, accumulate);                                                          \
  }
PTX_WGMMA(F16, false)
PTX_WGMMA(BF16, true)
#undef PTX_WGMMA

template <uint32_t R>
__forceinline__ void setmaxnreg_inc() {
  ::simt::setmaxnreg_inc(R);
}
template <uint32_t R>
__forceinline__ void setmaxnreg_dec() {
  ::simt::setmaxnreg_dec(R);
}

}  // namespace ptx
