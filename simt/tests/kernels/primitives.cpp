// The kernels of primitives.cuh and primitives_sm90a.cuh for the emulator.
#include "primitives.cuh"
#include "primitives_sm90a.cuh"
#include "simt/entry.hpp"

namespace {

// Tensor maps stay where the parameter block is.
template <void (*PRIMITIVE)(const MappedBuffers&)>
void mapped(MappedBuffers p) {
  PRIMITIVE(p);
}

}  // namespace

extern "C" {
void primitive_ldmatrix(const void* p) { simt::entry<ldmatrix<false>>(p); }
void primitive_ldmatrix_trans(const void* p) { simt::entry<ldmatrix<true>>(p); }
void primitive_mma_f16(const void* p) { simt::entry<mma<ptx::F16>>(p); }
void primitive_mma_bf16(const void* p) { simt::entry<mma<ptx::BF16>>(p); }
void primitive_shfl(const void* p) { simt::entry<exchange_lanes>(p); }
void primitive_cvt(const void* p) { simt::entry<convert>(p); }
void primitive_power(const void* p) { simt::entry<power>(p); }
void primitive_arithmetic(const void* p) { simt::entry<arithmetic>(p); }
void primitive_copies(const void* p) { simt::entry<copies>(p); }
void primitive_synchronise(const void* p) { simt::entry<synchronise>(p); }
void primitive_atomics(const void* p) { simt::entry<atomics>(p); }
void primitive_indices(const void* p) { simt::entry<indices>(p); }
void primitive_elect(const void* p) { simt::entry<mapped<elect>>(p); }
void primitive_change_registers(const void* p) { simt::entry<mapped<change_registers>>(p); }
void primitive_mbarriers(const void* p) { simt::entry<mapped<mbarriers>>(p); }
void primitive_bulk_load(const void* p) { simt::entry<mapped<bulk_load>>(p); }
void primitive_bulk_store(const void* p) { simt::entry<mapped<bulk_store>>(p); }
void primitive_wgmma_40_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 5>>>(p); }
void primitive_wgmma_40_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 5>>>(p); }
void primitive_wgmma_64_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 8>>>(p); }
void primitive_wgmma_64_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 8>>>(p); }
void primitive_wgmma_80_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 10>>>(p); }
void primitive_wgmma_80_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 10>>>(p); }
void primitive_wgmma_96_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 12>>>(p); }
void primitive_wgmma_96_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 12>>>(p); }
void primitive_wgmma_112_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 14>>>(p); }
void primitive_wgmma_112_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 14>>>(p); }
void primitive_wgmma_128_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 16>>>(p); }
void primitive_wgmma_128_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 16>>>(p); }
void primitive_wgmma_144_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 18>>>(p); }
void primitive_wgmma_144_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 18>>>(p); }
void primitive_wgmma_160_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 20>>>(p); }
void primitive_wgmma_160_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 20>>>(p); }
void primitive_wgmma_176_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 22>>>(p); }
void primitive_wgmma_176_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 22>>>(p); }
void primitive_wgmma_256_f16(const void* p) { simt::entry<mapped<wgmma<ptx::F16, 32>>>(p); }
void primitive_wgmma_256_bf16(const void* p) { simt::entry<mapped<wgmma<ptx::BF16, 32>>>(p); }
}
