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

constexpr int MAX_WGMMA_REGISTERS = 128;  // of a thread's accumulator: N / 2

// A thread's accumulator: one after the other in memory, or in slots of an interpreted program.
struct AccumulatorRegisters {
  char* base;
  const uint32_t* slots;  // of 8 bytes; null: the registers are adjacent
  float* at(int i) const { return reinterpret_cast<float*>(base + (slots ? 8 * size_t(slots[i]) : 4 * size_t(i))); }
};

struct WgmmaOperation {
  uint64_t a_descriptor, b_descriptor;
  int columns;  // N
  bool a_in_registers, bf16, accumulate;
  int guards;  // of each lane's registers that it brought
  uint32_t a[32][4];  // as they were at the issue: they must not change until the wait
  size_t accumulator;  // index
  Pc pc;
};

// A fragment with operations in flight: the values live here, the kernel's registers are poisoned.
struct WgmmaAccumulator {
  AccumulatorRegisters registers[32];
  int count = 0;  // of each lane
  float values[32][MAX_WGMMA_REGISTERS];
  int operations = 0;
};

// One warp's part of a product: too large for the stack of a fiber.
struct WgmmaTiles {
  static constexpr int ROWS = 16, MAX_COLUMNS = 2 * MAX_WGMMA_REGISTERS, K = 16;
  float a[ROWS][K], b[K][MAX_COLUMNS], c[ROWS][MAX_COLUMNS];
};

struct WgmmaQueue {
  std::vector<WgmmaOperation> open;                 // issued, not committed
  std::vector<std::vector<WgmmaOperation>> groups;  // committed, oldest first
  std::vector<WgmmaAccumulator> accumulators;
  bool fenced = false;
};

// Issues wgmma.m64nNk16 as the running thread; `a` is null where A lies in shared memory.
void issue_wgmma(bool bf16, AccumulatorRegisters d, int columns, const uint32_t* a, uint64_t a_descriptor,
                 uint64_t b_descriptor, bool accumulate, Pc pc);

// A plain access of the running thread to its registers.
void check_guarded(const std::vector<GuardedRegisters>& guarded, const char* p, size_t bytes, bool write, Pc pc);

// The warp's lanes exit.
void check_exit(const WgmmaQueue& queue);

}  // namespace simt
