// The machine's state: a launch has blocks; a block has shared memory, warps, barriers; a warp has 32 lanes.
// One OS thread runs one block at a time, so everything below Launch is touched by one OS thread only.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "banks.hpp"
#include "c_abi.h"
#include "fiber.hpp"
#include "global_shadow.hpp"
#include "mbarrier.hpp"
#include "race.hpp"
#include "sites.hpp"
#include "tma.hpp"
#include "wgmma.hpp"

namespace simt {

constexpr int LANES = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr int NAMED_BARRIERS = 16;
constexpr uint32_t SHARED_BASE = 0x400;   // where dynamic shared memory starts in its window: never 0, as on sm_90
constexpr size_t SHARED_MARGIN = 65536;   // around it, so that an access past its ends is recognised as one
constexpr size_t STACK_BYTES = 65536;     // per thread; holds its local arrays
constexpr unsigned char POISON = 0xff;    // repeated, a NaN as f16, bf16 and f32

struct Warp;

struct AsyncCopy {
  uint32_t offset, bytes, source_bytes;  // of shared memory; source_bytes <= bytes, the rest is zero-filled
  const char* source;
  Pc pc;
};

struct Thread {
  Fiber fiber;
  Warp* warp = nullptr;
  uint16_t id = 0;  // linear in the block
  uint8_t lane = 0;
  bool exited = false;
  uint32_t x = 0, y = 0, z = 0;  // threadIdx
  char* stack = nullptr;
  const char* waits_for = nullptr;  // for the deadlock report
  Pc waits_at = 0;
  std::vector<AsyncCopy> copies;  // in flight, oldest first; the last `uncommitted` of them are in no group yet
  std::vector<uint32_t> groups;   // sizes of the committed groups, oldest first
  uint32_t uncommitted = 0;
  BulkStores bulk_stores;
  GlobalSync sync;
  Knowledge knowledge;                     // beyond what its warp knows
  std::vector<GuardedRegisters> guarded;  // of wgmma in flight
};

// Instructions that a warp executes as one. The rendezvous compares these, never return addresses: compilers duplicate
// calls.
enum class Op : uint8_t {
  None, LdmatrixX4, LdmatrixX4Trans, LdmatrixX2, LdmatrixX2Trans, MmaK16F16, MmaK16Bf16, MmaK8F16, MmaK8Bf16,
  ShflBfly, ShflIdx, BarSync, BarWarpSync, ElectSync, SetmaxnregInc, SetmaxnregDec, WgmmaFence, WgmmaCommitGroup,
  WgmmaWaitGroup, WgmmaSharedF16, WgmmaSharedBf16, WgmmaRegistersF16, WgmmaRegistersBf16,
};
const char* name_of(Op op);

struct Warp {
  int id = 0;
  uint32_t runnable = 0;   // lanes that can continue
  uint32_t live = 0;       // lanes that have not exited
  uint32_t arrived = 0;    // lanes waiting at the instruction `op`
  Op op = Op::None;
  Pc op_pc = 0;
  int first_lane = 0;      // where the search for a runnable lane starts; changes at random
  void* arguments[LANES];  // what each arrived lane brought
  WarpClock clock;
  BankWindow banks;
  WgmmaQueue wgmma;
  uint32_t registers = 0;  // per thread
};

struct NamedBarrier {
  uint32_t threads = 0;  // expected, as its first warp said
  Pc pc = 0;
  std::vector<Warp*> waiting;
};

struct Region {
  char* begin;
  char* end;
  bool writable;
  const char* name;
  GlobalShadow* shadow;  // writable ones only
};

using SyncSite = SimtSite;

struct Fault {
  SimtFaultKind kind = SIMT_NO_FAULT;
  std::string message;
};

// One launch: what all its blocks share.
struct Launch {
  const SimtLaunch* request = nullptr;
  std::vector<Region> regions;  // the parameter block first, then the request's buffers
  GlobalSyncTable sync_table;
  std::atomic<bool> stop{false};  // some block failed: start no other
  bool checked() const { return request->checks != 0; }
};

struct Block {
  Launch* launch = nullptr;
  uint64_t linear = 0;
  uint32_t x = 0, y = 0, z = 0;  // blockIdx
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t ready = 0;  // warps with a runnable lane
  uint32_t alive = 0;  // threads that have not exited
  char* shared = nullptr;
  uint32_t shared_bytes = 0;
  char* stacks = nullptr;
  ShadowMemory shadow;
  WgmmaTiles wgmma_tiles;
  NamedBarrier barriers[NAMED_BARRIERS];
  std::deque<Mbarrier> mbarriers;  // never moved: threads wait at them
  std::vector<BulkCopy> bulk_copies;
  uint32_t free_registers = 0;
  std::vector<Thread*> register_queue;  // waiting for some
  int elected_lane = 0;
  BlockClock global_clock;
  std::vector<SyncSite> sites;
  std::vector<SimtBufferStats> buffer_stats;  // one per region
  size_t last_region = 0;
  SimtStats stats{};
  std::mt19937_64 random;
  Fiber host;  // where the block returns to when it is over
  Fault fault;
};

// What this OS thread is executing. `self` is null outside of kernels.
extern SIMT_OF_OS_THREAD Block* block;
extern SIMT_OF_OS_THREAD Thread* self;

// Ends the block with a report. The running fiber is abandoned, so whoever calls this must hold no lock.
[[noreturn]] void fail_with(SimtFaultKind kind, const std::string& message);
template <class... Parts>
[[noreturn]] void fail(SimtFaultKind kind, const Parts&... parts) {
  fail_with(kind, text(parts...));
}
[[noreturn]] inline void fail_for_overflow() {
  fail(SIMT_STACK_OVERFLOW, "the thread's local memory exceeds the ", STACK_BYTES, " bytes of its stack");
}

}  // namespace simt
