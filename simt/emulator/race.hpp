// Happens-before in shared memory: who has written and read each two bytes, and what orders it before what comes next.
//
// Time is counted per warp: its clock advances at each barrier it passes. A thread's access is stamped with (thread,
// clock of its warp). A warp knows, for every thread of the block, up to which clock that thread's accesses are ordered
// before its own; only barriers extend that knowledge. An access is a race when an earlier conflicting one is stamped
// later than what is known, whatever schedule happened to run: a race is found even where the values came out right.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "sites.hpp"

namespace simt {

struct Thread;
struct Warp;

struct WarpClock {
  uint32_t now = 1;
  std::vector<uint32_t> seen;  // per thread of the block
};

// Two bytes of shared memory are one cell: halves are the smallest elements that kernels exchange.
constexpr uint32_t CELL_BYTES = 2;

enum class CellState : uint8_t { Uninitialised, Valid, Pending };

class ShadowMemory {
 public:
  void reset(uint32_t shared_bytes, int warps);

  // Accesses at a byte offset of the block's dynamic shared memory; each checks, reports, and records itself.
  void read(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc);
  // ldmatrix: 32 lanes read together and all of them receive something, so the write must be ordered before all 32.
  void read_by_warp(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc);
  void write(const Thread& writer, uint32_t offset, uint32_t bytes, Pc pc);
  // An asynchronous copy: pending from its issue until `land`, which makes it a write of its thread's.
  void begin_copy(const Thread& issuer, uint32_t offset, uint32_t bytes, Pc pc);
  void land(const Thread& issuer, uint32_t offset, uint32_t bytes);

 private:
  void write_as(CellState state, const Thread& writer, uint32_t offset, uint32_t bytes, Pc pc);
  void check_written(const Warp& warp, int lane, uint64_t key, uint32_t cell, Pc pc);
  void check_readers(const Thread& writer, uint32_t first, uint32_t last, Pc pc);
  void record_read(const Warp& warp, int lane, uint32_t first, uint32_t last, Pc pc);
  [[noreturn]] void report(const char* access, uint32_t cell, Pc pc, const std::string& against);

  // Apart, because only keys and readers are touched where all is well.
  std::vector<uint64_t> keys_;     // last write: clock, thread, state
  std::vector<Pc> write_pcs_;      // and where
  std::vector<uint64_t> readers_;  // last read of each warp, [warp][cell]: clock, lane, pc; 0: none since that write
  uint32_t cells_ = 0;
  int warps_ = 0;
};

// A barrier among these warps: what any of them knew or did before it, all of them know after it.
void join(Warp* const* warps, size_t count);

// "warp 1 lane 3".
std::string thread_name(uint32_t thread);

// Fills with poison, which is a NaN in every float type.
void poison(char* memory, size_t bytes);

}  // namespace simt
