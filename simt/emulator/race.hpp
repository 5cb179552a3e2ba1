// Happens-before in shared memory: who has written and read each two bytes, and what orders it before what comes next.
//
// A thread's access is stamped with (thread, clock of its warp); clocks.hpp knows up to which clock another's accesses
// are ordered before one's own. An access is a race when an earlier conflicting one is stamped later than what is
// known, whatever schedule happened to run: a race is found even where the values came out right.
//
// Bulk copies and wgmma go through the async proxy, for which order is not enough: what plain stores wrote must also
// have been fenced towards it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "clocks.hpp"
#include "sites.hpp"

namespace simt {

// Two bytes of shared memory are one cell: halves are the smallest elements that kernels exchange.
constexpr uint32_t CELL_BYTES = 2;

// No key of a write.
constexpr uint64_t NO_WRITE = ~uint64_t(0);

enum class CellState : uint8_t { Uninitialised, Valid, Pending, Mbarrier };

class ShadowMemory {
 public:
  void reset(uint32_t shared_bytes, size_t warps);

  // Accesses at a byte offset of the block's dynamic shared memory; each checks, reports, and records itself.
  void read(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc);
  // ldmatrix: 32 lanes read together and all of them receive something, so the write must be ordered before all 32.
  void read_by_warp(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc);
  void write(const Thread& writer, uint32_t offset, uint32_t bytes, Pc pc);
  // An asynchronous copy: pending from its issue until `land`, which makes it a write of its thread's.
  void begin_copy(const Thread& issuer, uint32_t offset, uint32_t bytes, Pc pc);
  void land(const Thread& issuer, uint32_t offset, uint32_t bytes);

  // A bulk copy: as above, but through the async proxy, and landing makes it a write of its mbarrier's.
  void begin_bulk_copy(const Thread& issuer, uint32_t offset, uint32_t bytes, Pc pc);
  void land_bulk(uint32_t actor, uint32_t time, uint32_t offset, uint32_t bytes);
  // An operand of wgmma: read by the whole warp through the async proxy at any time between `hold` and `let_go`.
  // `good` goes from one part of an operand to the next: the last write that was found to be ordered before; at first NO_WRITE.
  void hold(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc, uint64_t& good);
  void let_go(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc);
  // The source of a bulk store: read by one thread, likewise.
  void hold(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc);
  void let_go(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc);
  // The eight bytes of an mbarrier: an opaque object from its initialisation on.
  void init_mbarrier(const Thread& writer, uint32_t offset, Pc pc);
  void use_mbarrier(const Thread& user, uint32_t offset, Pc pc);

 private:
  void write_as(CellState state, const Thread& writer, uint32_t offset, uint32_t bytes, Pc pc, bool in_proxy = false);
  void check_written(const Warp& warp, int lane, uint64_t key, uint32_t cell, Pc pc);
  [[noreturn]] void report_proxy(const char* access, uint32_t cell, Pc pc, uint32_t writer);
  void check_holders(uint32_t first, uint32_t last, Pc pc);
  void check_readers(const Thread& writer, uint32_t first, uint32_t last, Pc pc);
  void record_read(const Warp& warp, int lane, uint32_t first, uint32_t last, Pc pc);
  [[noreturn]] void report(const char* access, uint32_t cell, Pc pc, const std::string& against);

  // Apart, because only keys and readers are touched where all is well.
  std::vector<uint64_t> keys_;     // last write: clock, thread, state
  std::vector<Pc> write_pcs_;      // and where
  std::vector<uint32_t> read_by_;  // which warps have read since
  std::vector<uint64_t> readers_;  // last read of each of these, [warp][cell]: clock, lane, pc
  // Operands of wgmma and sources of bulk stores in flight, by cell: how many, and the last. Empty in a block that has none.
  struct Holder {
    Pc pc = 0;
    uint16_t count = 0;
    bool store = false;
  };
  Holder* holders();
  std::vector<Holder> holders_;
  uint32_t cells_ = 0;
};

// "warp 1 lane 3", or "the bulk copy of mbarrier 2".
std::string actor_name(uint32_t actor);

// Fills with poison, which is a NaN in every float type.
void poison(char* memory, size_t bytes);

}  // namespace simt
