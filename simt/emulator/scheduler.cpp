// Warps are picked at random by seed; inside a warp the lanes run one after the other up to the next warp-wide
// instruction, starting with a random one. Nothing here ever spins, so "no lane can run" is a deadlock and no guess.
#include "scheduler.hpp"

#include <map>

#include "../ptx/program.hpp"

namespace simt {

SIMT_OF_OS_THREAD Block* block = nullptr;
SIMT_OF_OS_THREAD Thread* self = nullptr;

const char* name_of(Op op) {
  switch (op) {
    case Op::None: return "nothing";
    case Op::LdmatrixX4: return "ldmatrix.x4";
    case Op::LdmatrixX4Trans: return "ldmatrix.x4.trans";
    case Op::LdmatrixX2: return "ldmatrix.x2";
    case Op::LdmatrixX2Trans: return "ldmatrix.x2.trans";
    case Op::MmaK16F16: return "mma.m16n8k16.f16";
    case Op::MmaK16Bf16: return "mma.m16n8k16.bf16";
    case Op::MmaK8F16: return "mma.m16n8k8.f16";
    case Op::MmaK8Bf16: return "mma.m16n8k8.bf16";
    case Op::ShflBfly: return "shfl.bfly";
    case Op::ShflIdx: return "shfl.idx";
    case Op::BarSync: return "bar.sync";
    case Op::BarWarpSync: return "bar.warp.sync";
    case Op::ElectSync: return "elect.sync";
    case Op::SetmaxnregInc: return "setmaxnreg.inc";
    case Op::SetmaxnregDec: return "setmaxnreg.dec";
    case Op::WgmmaFence: return "wgmma.fence";
    case Op::WgmmaCommitGroup: return "wgmma.commit_group";
    case Op::WgmmaWaitGroup: return "wgmma.wait_group";
    case Op::WgmmaSharedF16: return "wgmma.m64nNk16.f16 of two shared operands";
    case Op::WgmmaSharedBf16: return "wgmma.m64nNk16.bf16 of two shared operands";
    case Op::WgmmaRegistersF16: return "wgmma.m64nNk16.f16 with A in registers";
    case Op::WgmmaRegistersBf16: return "wgmma.m64nNk16.bf16 with A in registers";
  }
  return "?";
}

namespace {

Thread& thread_of(Warp& warp, int lane) { return block->threads[warp.id * LANES + lane]; }

Thread& runnable_lane(Warp& warp) {
  // Rotated so that `first_lane` is looked at first.
  int k = warp.first_lane;
  uint32_t rotated = k ? warp.runnable >> k | warp.runnable << (LANES - k) : warp.runnable;
  return thread_of(warp, (__builtin_ctz(rotated) + k) % LANES);
}

std::string deadlock_report() {
  std::string report = "no thread can continue";
  for (Warp& warp : block->warps) {
    if (!warp.live) continue;
    std::map<std::pair<std::string, Pc>, int> places;
    int exited = 0;
    for (int lane = 0; lane < LANES; lane++) {
      Thread& t = thread_of(warp, lane);
      if (t.exited) exited++;
      else places[{t.waits_for, t.waits_at}]++;
    }
    for (auto& [place, lanes] : places)
      report += text("\n    warp ", warp.id, ": ", lanes, " lanes wait for ", place.first, " (", at(place.second), ")");
    if (exited) report += text("\n    warp ", warp.id, ": ", exited, " lanes have exited");
  }
  int gone = 0;
  for (Warp& warp : block->warps) gone += !warp.live;
  if (gone) report += text("\n    ", gone, " warps have exited");
  return report + mbarrier_report();
}

// The next lane to run; null once all have exited.
Thread* pick() {
  Block& b = *block;
  while (!b.ready && b.alive && land_bulk_copy()) {
  }
  if (b.ready) {
    uint32_t warps = b.ready;
    for (int skip = int(b.random() % __builtin_popcount(warps)); skip > 0; skip--) warps &= warps - 1;
    return &runnable_lane(b.warps[__builtin_ctz(warps)]);
  }
  if (b.alive == 0) return nullptr;
  self = nullptr;
  fail(SIMT_DEADLOCK, deadlock_report());
}

void switch_to(Thread* next) {
  Thread* me = self;
  if (next == me) return;
  block->stats.switches++;
  self = next;
  fiber_switch(me->fiber, next->fiber);
}

void stop_running(Thread& t) {
  Warp& warp = *t.warp;
  warp.runnable &= ~(1u << t.lane);
  if (!warp.runnable) block->ready &= ~(1u << warp.id);
}

// The first word of each stack: the end that a too deep call reaches first.
constexpr uint64_t CANARY = 0x5717c4a95717c4a9;
uint64_t& canary_of(Thread& t) { return *reinterpret_cast<uint64_t*>(t.stack); }

void thread_main() {
  const SimtLaunch& request = *block->launch->request;
  interpreted_at = 0;
  if (request.program) interpret(*static_cast<const Program*>(request.program), request.params);
  else request.entry(request.params);

  Thread& t = *self;
  Warp& warp = *t.warp;
  if (canary_of(t) != CANARY) fail_for_overflow();
  if (!t.copies.empty())
    fail(SIMT_COPY_AT_EXIT, "the thread exits while ", t.copies.size(),
         " of its asynchronous copies are in flight, the first issued at (", at(t.copies[0].pc), ")",
         t.uncommitted ? ", never committed" : "");
  finish_bulk_stores();
  check_exit(warp.wgmma);
  if (block->alive == 1 && !block->bulk_copies.empty())
    fail(SIMT_COPY_AT_EXIT, "the block's last thread exits while ", block->bulk_copies.size(),
         " bulk copies are in flight, the first issued at (", at(block->bulk_copies[0].pc), ")");
  if (warp.arrived)
    fail(SIMT_DIVERGENCE, "the lane exits while ", __builtin_popcount(warp.arrived), " lanes of its warp are at ",
         name_of(warp.op), " (", at(warp.op_pc), ")");
  t.exited = true;
  block->alive--;
  warp.live &= ~(1u << t.lane);
  stop_running(t);
  Thread* next = warp.runnable ? &runnable_lane(warp) : pick();
  self = next;
  Fiber abandoned;
  fiber_switch(abandoned, next ? next->fiber : block->host);
  __builtin_unreachable();
}

}  // namespace

void fail_with(SimtFaultKind kind, const std::string& message) {
  Block& b = *block;
  char where[128] = "";
  if (self)
    snprintf(where, sizeof where, "block (%u, %u, %u) warp %d lane %d: ", b.x, b.y, b.z, self->warp->id, self->lane);
  else
    snprintf(where, sizeof where, "block (%u, %u, %u): ", b.x, b.y, b.z);
  b.fault.kind = kind;
  b.fault.message = where + message;
  self = nullptr;
  Fiber abandoned;
  fiber_switch(abandoned, b.host);
  __builtin_unreachable();
}

void run_block_threads() {
  Block& b = *block;
  for (Thread& t : b.threads) {
    canary_of(t) = CANARY;
    // Tops of stacks are staggered: at equal offsets all of a warp's frames would compete for the same sets of the
    // cache.
    fiber_prepare(t.fiber, t.stack, STACK_BYTES - (t.id % 64) * 64, &thread_main);
  }
  self = pick();
  fiber_switch(b.host, self->fiber);
  self = nullptr;
}

void block_self(const char* what, Pc pc) {
  Warp& warp = *self->warp;
  self->waits_for = what;
  self->waits_at = pc;
  stop_running(*self);
  switch_to(warp.runnable ? &runnable_lane(warp) : pick());
}

void wake(Warp& warp) {
  warp.runnable = warp.live;
  block->ready |= 1u << warp.id;
}

void wake_lane(Thread& thread) {
  thread.warp->runnable |= 1u << thread.lane;
  block->ready |= 1u << thread.warp->id;
}

void yield_to_any() { switch_to(pick()); }

void yield_sometimes() {
  if (block->random() % 16 == 0) yield_to_any();
}

bool arrive(Op op, Pc pc, void* arguments) {
  Warp& warp = *self->warp;
  block->stats.collectives++;
  if (warp.live != ALL_LANES)
    fail(SIMT_DIVERGENCE, name_of(op), " (", at(pc), ") reached after ", LANES - __builtin_popcount(warp.live),
         " lanes of the warp have exited");
  if (!warp.arrived) {
    warp.op = op;
    warp.op_pc = pc;
  } else if (warp.op != op) {
    fail(SIMT_DIVERGENCE, "lanes of one warp at different instructions: this one at ", name_of(op), " (", at(pc),
         "), ", __builtin_popcount(warp.arrived), " others at ", name_of(warp.op), " (", at(warp.op_pc), ")");
  }
  warp.arguments[self->lane] = arguments;
  warp.arrived |= 1u << self->lane;
  if (warp.arrived == ALL_LANES) return true;
  block_self(name_of(op), pc);
  return false;
}

void finish(Warp& warp) {
  warp.arrived = 0;
  warp.banks.close(block->stats);
  uint64_t dice = block->random();
  warp.first_lane = int(dice >> 8 & (LANES - 1));
  wake(warp);
  if (dice % 16 == 0) yield_to_any();
}

bool dropped(const char* what, Pc pc) {
  bool found = false;
  for (SyncSite& site : block->sites) {
    if (site.pc != pc) continue;
    site.executed++;
    found = true;
    break;
  }
  if (!found) block->sites.push_back({pc, what, 1});
  const SimtLaunch& request = *block->launch->request;
  for (size_t i = 0; i < request.dropped_count; i++)
    if (request.dropped[i] == pc) return true;
  return false;
}

}  // namespace simt
