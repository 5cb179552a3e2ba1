// Every machine instruction that a kernel may use, declared once. One primitive = one PTX instruction, named after it.
//
// Two sets of bodies: asm.h (nvcc: one `asm volatile` each) and the emulator in simt/ (emulated.h says what it adds to
// a host compiler). The choice between them is the one `#if` of all kernel code, beside that in asm.h which leaves out
// what the architecture lacks. No CUDA header is needed: halves are uint16_t or packed uint32_t bits, shared memory is
// addressed by its 32-bit window address.
//
// Words used below
//   converged   all 32 lanes of the warp execute this very instruction; the emulator reports anything else
//   thread      each thread on its own, divergence allowed
//   orders memory   writes before it by any participant are visible after it to every participant. Nothing else orders:
//                   neither shfl nor mma nor ldmatrix makes another lane's store visible.
// Sections cited are those of the PTX ISA manual. Fragment layouts: simt/emulator/fragments.hpp holds the one map.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define PTX_FUNCTION __device__ __forceinline__
#define PTX_BODIES "asm.h"
#else
#define PTX_FUNCTION
#define PTX_BODIES "emulated.h"
#endif

namespace ptx {

// Tags that choose the element type of a matrix product.
struct F16 {};   // IEEE binary16
struct BF16 {};  // the upper half of an f32

// ---- shared memory --------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, 1024-byte aligned. Not an instruction: `extern __shared__`. thread.
PTX_FUNCTION char* dynamic_shared();

// cvta.to.shared.u64 + cvt.u32.u64: generic pointer into shared memory -> address in the shared window. thread.
// "Data Movement and Conversion Instructions: cvta".
PTX_FUNCTION uint32_t shared_address(const void* pointer);

// ---- shared memory -> fragments -------------------------------------------------------------------------------------

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: four 8x8 matrices of 16-bit elements; lane 8m+r gives the 16-byte
// aligned address of row r of matrix m, which arrives in r[m]. `trans` hands out the transposed matrices.
// converged. A weak read of shared memory: orders nothing. "Warp-level Matrix Instructions: ldmatrix".
PTX_FUNCTION void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address);
PTX_FUNCTION void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address);

// ldmatrix….x2[.trans]: as x4 with two matrices, addresses from lanes 0..15. The addresses of the other lanes are
// ignored, but must be valid ones on sm_75 and older; give them some row of the tile.
PTX_FUNCTION void ldmatrix_x2(uint32_t (&r)[2], uint32_t row_address);
PTX_FUNCTION void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row_address);

// ---- matrix product -------------------------------------------------------------------------------------------------

// mma.sync.aligned.m16n8k16.row.col.f32.{f16,bf16}.{f16,bf16}.f32: d[16,8] += a[16,16] · b[16,8]. converged. Products
// are exact, sums are f32 in an order and with a rounding that the ISA leaves open: compare by error bound, bitwise
// only where every partial sum is exact. "Matrix Fragments for mma.m16n8k16 with floating point type".
PTX_FUNCTION void mma_m16n8k16(F16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
PTX_FUNCTION void mma_m16n8k16(BF16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// mma….m16n8k8: d[16,8] += a[16,8] · b[8,8]. converged. "Matrix Fragments for mma.m16n8k8".
PTX_FUNCTION void mma_m16n8k8(F16, float (&d)[4], const uint32_t (&a)[2], uint32_t b);
PTX_FUNCTION void mma_m16n8k8(BF16, float (&d)[4], const uint32_t (&a)[2], uint32_t b);

// ---- exchange between lanes -----------------------------------------------------------------------------------------

// shfl.sync.bfly.b32 with member mask 0xffffffff, clamp 0x1f: the value of lane (own lane ^ mask).
// converged. Moves registers, orders no memory. "Data Movement and Conversion Instructions: shfl.sync".
PTX_FUNCTION float shfl_bfly_f32(float value, uint32_t lane_mask);

// shfl.sync.idx.b32: the value of lane (source_lane & 31). converged, orders no memory.
PTX_FUNCTION float shfl_idx_f32(float value, uint32_t source_lane);
PTX_FUNCTION uint32_t shfl_idx_b32(uint32_t value, uint32_t source_lane);

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// ex2.approx.ftz.f32: 2^x, maximum relative error 2^-22; denormal arguments and results are zero, -inf gives 0. thread.
// "Floating Point Instructions: ex2".
PTX_FUNCTION float ex2_approx_ftz_f32(float x);

// lg2.approx.ftz.f32: log2 x; denormal arguments count as zero, 0 gives -inf. thread. "Floating Point Instructions:
// lg2".
PTX_FUNCTION float lg2_approx_ftz_f32(float x);

// rcp.approx.ftz.f32: 1 / x, relative error at most 2^-23; denormal arguments and results are zero. thread. "Floating
// Point Instructions: rcp".
PTX_FUNCTION float rcp_approx_ftz_f32(float x);

// max.f32: the larger one; of a number and a NaN the number. One instruction, as a comparison in C++ is not, which has to
// mind the NaN. thread. "Floating Point Instructions: max".
PTX_FUNCTION float max_f32(float a, float b);

// fma.rn.f32: a · b + c, rounded once. thread. "Floating Point Instructions: fma".
PTX_FUNCTION float fma_rn_f32(float a, float b, float c);

// ---- conversion -----------------------------------------------------------------------------------------------------

// cvt.rn.{f16x2,bf16x2}.f32: two f32, rounded to nearest even, `hi` in the upper half. The operand order is the
// instruction's. thread. "Data Movement and Conversion Instructions: cvt".
PTX_FUNCTION uint32_t cvt_rn_f16x2_f32(float hi, float lo);
PTX_FUNCTION uint32_t cvt_rn_bf16x2_f32(float hi, float lo);

// cvt.f32.f16: exact. thread.
PTX_FUNCTION float cvt_f32_f16(uint16_t bits);

// bf16 -> f32 is a shift: `mov.b32 {0, bits}`, which every architecture has (cvt.f32.bf16 needs sm_90). Exact. thread.
PTX_FUNCTION float cvt_f32_bf16(uint16_t bits);

// ---- asynchronous copies, global -> shared --------------------------------------------------------------------------

// cp.async.{cg,ca}.shared.global [dst], [src], cp_size, src_size: copies src_size bytes and fills the rest of cp_size
// with zeros; nothing of src is read beyond src_size, and nothing at all when it is 0. dst and src are aligned to
// cp_size, even then. thread. The bytes land at any time up to the wait that covers their group; until then nobody may
// touch dst. After the wait they are visible to the issuing thread only: the others need a barrier as well. "Data
// Movement and Conversion Instructions: cp.async". cg (past L1) exists for 16 bytes only, ca for 4, 8 and 16.
PTX_FUNCTION void cp_async_cg_16(uint32_t dst, const void* src, uint32_t src_size);
PTX_FUNCTION void cp_async_ca_8(uint32_t dst, const void* src, uint32_t src_size);
PTX_FUNCTION void cp_async_ca_4(uint32_t dst, const void* src, uint32_t src_size);

// cp.async.commit_group: closes the group of this thread's copies issued since the last commit; may be empty. thread.
PTX_FUNCTION void cp_async_commit_group();

// cp.async.wait_group N: waits until at most the N youngest groups of this thread are in flight. Copies that were never
// committed are not waited for. thread. Orders this thread's copies before what it does next.
template <int N>
PTX_FUNCTION void cp_async_wait_group();

// ---- synchronisation ------------------------------------------------------------------------------------------------

// bar.sync id, threads: barrier `id` (0..15; 0 is barrier_cta's) among `threads` threads, a multiple of 32.
// converged within each warp. Orders memory among its participants. "Parallel Synchronization: bar / barrier".
PTX_FUNCTION void bar_sync(uint32_t id, uint32_t threads);

// bar.sync 0: barrier of the whole block (__syncthreads). converged within each warp. Orders memory.
PTX_FUNCTION void barrier_cta();

// bar.warp.sync 0xffffffff: converges the warp and orders memory among its lanes. "bar.warp.sync".
PTX_FUNCTION void bar_warp_sync();

// ---- global memory shared between blocks ----------------------------------------------------------------------------

// red.relaxed.gpu.global.add.f32: *address += value, atomically, in an order that changes from run to run. thread.
// Relaxed: orders no other access. "Parallel Synchronization: red".
PTX_FUNCTION void red_add_f32(float* address, float value);

// atom.relaxed.gpu.global.add.u32: returns the value before. thread. Relaxed: to publish plain stores, fence before it;
// to read what others published, fence after it.
PTX_FUNCTION uint32_t atom_add_u32(uint32_t* address, uint32_t value);

// fence.acq_rel.gpu (__threadfence): makes what this thread has written or seen visible to whoever synchronises with a
// later atomic of this thread, and conversely. thread. "Parallel Synchronization: membar / fence".
PTX_FUNCTION void fence_acq_rel_gpu();

// ---- sm_90a: election, registers ------------------------------------------------------------------------------------
// From here on what only sm_90a has; asm.h leaves the bodies out elsewhere.

// elect.sync with member mask 0xffffffff: true in one lane of the warp, always the same one. converged, orders no
// memory. "Parallel Synchronization: elect.sync".
PTX_FUNCTION bool elect_sync();

// setmaxnreg.{inc,dec}.sync.aligned.u32 R: the registers of each thread from now on, a multiple of 8 from 24 to 256.
// dec gives the others back to the block's pool, inc waits until the pool holds enough. converged, and executed by all
// warps of a warpgroup. "Miscellaneous Instructions: setmaxnreg".
template <uint32_t R>
PTX_FUNCTION void setmaxnreg_inc();
template <uint32_t R>
PTX_FUNCTION void setmaxnreg_dec();

// ---- sm_90a: mbarriers ----------------------------------------------------------------------------------------------
// An mbarrier is 8 bytes of shared memory, 8-byte aligned. Its phase completes when `count` arrivals and all announced
// bytes are in; the next one begins at once. "Parallel Synchronization: mbarrier".

// mbarrier.init.shared::cta.b64. thread. The others need a barrier before they use it, and bulk copies a fence as well.
PTX_FUNCTION void mbarrier_init(uint32_t barrier, uint32_t count);

// fence.mbarrier_init.release.cluster: shows this thread's initialisations to the async proxy. thread.
PTX_FUNCTION void fence_mbarrier_init();

// mbarrier.arrive.shared::cta.b64: releases what this thread did before to whoever waits for the phase. thread.
PTX_FUNCTION void mbarrier_arrive(uint32_t barrier);

// mbarrier.arrive.expect_tx.shared::cta.b64: as arrive, and the phase waits for `bytes` more of bulk copies. thread.
PTX_FUNCTION void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes);

// mbarrier.try_wait.parity.shared::cta.b64: true once the phase of this parity (0 for the first) has completed;
// acquires what its arrivals released and its bulk copies wrote. False after a while of the hardware's choice: call it
// in a loop. thread.
PTX_FUNCTION bool mbarrier_try_wait_parity(uint32_t barrier, uint32_t parity);

// ---- sm_90a: the async proxy ----------------------------------------------------------------------------------------

// fence.proxy.async.shared::cta: plain accesses of shared memory before it are visible to bulk copies and wgmma after
// it. thread. "Parallel Synchronization: membar / fence".
PTX_FUNCTION void fence_proxy_async_shared_cta();

// What cuTensorMapEncodeTiled made on the host. A kernel gets it inside of a __grid_constant__ parameter and passes its
// address on.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [dst], [map, {c0, c1, c2, c3}],
// [barrier]: copies the map's box from these coordinates (innermost first) on, zeros outside of the tensor, and counts
// the whole box's bytes at the mbarrier when they have landed. thread: let one do it. dst is 128-byte aligned, with the
// 128-byte swizzle 1024. "Data Movement and Conversion Instructions: cp.async.bulk.tensor".
PTX_FUNCTION void cp_async_bulk_tensor_4d(uint32_t dst, const TensorMap* map, uint32_t barrier, int32_t c0, int32_t c1,
                                          int32_t c2, int32_t c3);

// cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [map, {c0, c1, c2, c3}], [src]: copies the map's box from shared
// memory to these coordinates; nothing is written outside of the tensor. thread. Reads shared memory through the async
// proxy, at any time up to the wait that covers its group. src is aligned as the destination of a load.
PTX_FUNCTION void cp_async_bulk_tensor_store_4d(const TensorMap* map, uint32_t src, int32_t c0, int32_t c1, int32_t c2,
                                                int32_t c3);

// cp.async.bulk.commit_group: closes the group of this thread's bulk stores issued since the last commit. thread.
PTX_FUNCTION void cp_async_bulk_commit_group();

// cp.async.bulk.wait_group.read N: waits until at most the N youngest groups of this thread have yet to read shared
// memory, which may be written again then; global memory may still be written later, up to the end of the kernel. thread. "Data
// Movement and Conversion Instructions: cp.async.bulk.wait_group".
template <int N>
PTX_FUNCTION void cp_async_bulk_wait_group_read();

// ---- sm_90a: matrix product of a warpgroup --------------------------------------------------------------------------
// Four consecutive warps, from a multiple of four on, execute these together; warp w of them has rows 16w to 16w + 15.
// converged. "Asynchronous Warpgroup Level Matrix Instructions".

// wgmma.fence.sync.aligned: before the first wgmma, and again after accumulators or A registers were touched.
PTX_FUNCTION void wgmma_fence();

// wgmma.commit_group.sync.aligned: closes the group of the products issued since the last commit.
PTX_FUNCTION void wgmma_commit_group();

// wgmma.wait_group.sync.aligned N: waits until at most the N youngest groups are in flight. Until then their
// accumulators are not to be touched, their A registers and shared operands not to be written.
template <int N>
PTX_FUNCTION void wgmma_wait_group();

// wgmma.mma_async.sync.aligned.m64nNk16.f32.{f16,bf16}.{f16,bf16}: d[64,N] = a[64,16] · b[16,N], added to d if
// `accumulate`; N = 8 · TILES, up to 256. Reads shared memory through the async proxy. A and B by matrix descriptor with the
// 128-byte swizzle, both K-major; or A in registers, as mma.m16n8k16 has it, and B MN-major. d: tiles of
// mma.m16n8k16's along n, four registers each. "Register Fragments for wgmma.mma_async.m64nNk16", "Matrix Descriptor
// Format". asm_sm90a.h lists the N that it has.
template <int TILES>
PTX_FUNCTION void wgmma_m64nNk16(F16, float (&d)[TILES][4], uint64_t a, uint64_t b, bool accumulate);
template <int TILES>
PTX_FUNCTION void wgmma_m64nNk16(BF16, float (&d)[TILES][4], uint64_t a, uint64_t b, bool accumulate);
template <int TILES>
PTX_FUNCTION void wgmma_m64nNk16(F16, float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool accumulate);
template <int TILES>
PTX_FUNCTION void wgmma_m64nNk16(BF16, float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool accumulate);

}  // namespace ptx

#include PTX_BODIES
