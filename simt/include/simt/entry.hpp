// How a kernel's translation unit hands a kernel to the emulator:
//
//     #include "forward.cuh"
//     #include "simt/entry.hpp"
//     extern "C" void forward_f16_d64(const void* params) { simt::entry<forward<F16, 64>>(params); }
//
// The name is then what Rust declares. Everything outside of this function is the kernel's in reports.
#pragma once

namespace simt {

template <auto Kernel>
struct Entry;

template <class Params, void (*Kernel)(Params)>
struct Entry<Kernel> {
  // By value, as on the device: each thread has its own copy of the parameter block.
  static void call(const void* params) { Kernel(*static_cast<const Params*>(params)); }
};

template <auto Kernel>
inline __attribute__((always_inline)) void entry(const void* params) {
  Entry<Kernel>::call(params);
}

}  // namespace simt
