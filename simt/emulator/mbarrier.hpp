// mbarrier objects: phases that complete when all arrivals and all announced bytes are in ("Parallel Synchronization:
// mbarrier"). A completed phase hands what its arrivals released to whoever waits for it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "clocks.hpp"
#include "sites.hpp"

namespace simt {

struct Thread;

struct Mbarrier {
  uint32_t offset = 0;   // of shared memory
  uint32_t actor = 0;    // in whose name its bulk copies write
  uint32_t count = 0;    // arrivals of a phase
  uint32_t pending = 0;  // of them, to come
  int64_t bytes = 0;     // announced by expect_tx, less those that arrived; may be negative until the phase completes
  uint32_t phase = 0;
  Knowledge arriving, done;      // of the current phase, of the last completed one
  std::vector<Thread*> waiting;  // blocked in try_wait
  uint32_t initialiser = 0;      // the thread
  uint32_t fenced_at = 0;        // its clock at the fence after the initialisation; 0: none yet
};

// The mbarrier at a window address; reports if there is none, or if this thread need not see it yet.
Mbarrier& mbarrier_at(uint32_t address, const char* what, Pc pc);

// Bytes of a bulk copy have landed.
void complete_bytes(Mbarrier& barrier, uint32_t bytes);

// fence.mbarrier_init and fence.proxy.async alike show this thread's initialisations to the async proxy.
void fence_initialisations(Thread& thread);

// What each mbarrier with somebody waiting lacks, one line each, for the deadlock report.
std::string mbarrier_report();

}  // namespace simt
