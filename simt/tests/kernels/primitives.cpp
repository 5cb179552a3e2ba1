// The kernels of primitives.cuh for the emulator.
#include "primitives.cuh"
#include "simt/entry.hpp"

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
}
