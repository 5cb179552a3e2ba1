// wgmma of one warp: issued, but executed only when the warp waits for it ("Asynchronous Warpgroup Level Matrix
// Instructions").
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sites.hpp"

namespace simt {

// Registers of one thread that an instruction in flight writes, or reads only.
struct GuardedRegisters {
  const char* begin;
  size_t bytes;
  bool written;
  Pc pc;
};

struct WgmmaOperation {
  uint64_t a_descriptor, b_descriptor;
  bool a_in_registers, bf16, accumulate;
  uint32_t a[32][4];  // as they were at the issue: they must not change until the wait
  size_t accumulator;  // index
  Pc pc;
};

// A fragment with operations in flight: the values live here, the kernel's registers are poisoned.
struct WgmmaAccumulator {
  float* registers[32];
  float values[32][32];
  int operations = 0;
};

struct WgmmaQueue {
  std::vector<WgmmaOperation> open;                 // issued, not committed
  std::vector<std::vector<WgmmaOperation>> groups;  // committed, oldest first
  std::vector<WgmmaAccumulator> accumulators;
  bool fenced = false;
};

// A plain access of the running thread to its registers.
void check_guarded(const std::vector<GuardedRegisters>& guarded, const char* p, size_t bytes, bool write, Pc pc);

// The warp's lanes exit.
void check_exit(const WgmmaQueue& queue);

}  // namespace simt
