// Barriers, fences and atomics.
#include <cstring>

#include "../../kernels/ptx/contract.h"
#include "memory.hpp"
#include "scheduler.hpp"

namespace simt {
namespace {

struct BarrierLane {
  uint32_t id, threads;
};

// The warp has arrived with all its lanes. Returns when the barrier has completed, in the lane that completed it at
// once.
void arrive_at_barrier(Warp& warp, BarrierLane which, Pc pc) {
  NamedBarrier& barrier = block->barriers[which.id];
  if (barrier.waiting.empty()) {
    barrier.threads = which.threads;
    barrier.pc = pc;
  } else if (barrier.threads != which.threads) {
    fail(SIMT_BARRIER, "barrier ", which.id, " entered for ", which.threads, " threads (", at(pc),
         "), by another warp for ", barrier.threads, " (", at(barrier.pc), ")");
  }
  barrier.waiting.push_back(&warp);
  warp.arrived = 0;  // the lanes are past the rendezvous, and wait for the other warps
  if (barrier.waiting.size() * LANES < which.threads) {
    block_self(name_of(Op::BarSync), pc);
    return;
  }
  block->stats.barriers++;
  join(barrier.waiting.data(), barrier.waiting.size());
  for (Warp* waiting : barrier.waiting) {
    waiting->banks.close(block->stats);
    wake(*waiting);
  }
  barrier.waiting.clear();
  yield_to_any();
}

void barrier_sync(uint32_t id, uint32_t threads, Pc pc) {
  if (id >= NAMED_BARRIERS) fail(SIMT_BARRIER, "there is no barrier ", id, " (", at(pc), ")");
  if (threads == 0 || threads % LANES || threads > block->threads.size())
    fail(SIMT_BARRIER, "barrier among ", threads, " threads in a block of ", block->threads.size(),
         ", not a multiple of 32 within it (", at(pc), ")");
  BarrierLane mine{id, threads};
  if (!arrive(Op::BarSync, pc, &mine)) return;
  Warp& warp = *self->warp;
  for (void* argument : warp.arguments) {
    const BarrierLane& lane = *static_cast<const BarrierLane*>(argument);
    if (lane.id != id || lane.threads != threads)
      fail(SIMT_DIVERGENCE, "lanes of one warp at different barriers: ", lane.id, " for ", lane.threads, " threads, ",
           id, " for ", threads, " (", at(pc), ")");
  }
  arrive_at_barrier(warp, mine, pc);
}

struct Nothing {};

struct ElectedLane {
  bool elected;
};

}  // namespace
}  // namespace simt

namespace ptx {

using namespace simt;

void barrier_cta() {
  const Pc pc = SIMT_CALLER;
  if (dropped("bar.sync 0", pc)) return;
  barrier_sync(0, uint32_t(block->threads.size()), pc);
}

void bar_sync(uint32_t id, uint32_t threads) {
  const Pc pc = SIMT_CALLER;
  if (dropped("bar.sync", pc)) return;
  barrier_sync(id, threads, pc);
}

void bar_warp_sync() {
  const Pc pc = SIMT_CALLER;
  if (dropped("bar.warp.sync", pc)) return;
  Nothing mine;
  collective(Op::BarWarpSync, pc, mine, [](Warp& warp, auto&) {
    Warp* alone = &warp;
    join(&alone, 1);
    block->stats.warp_barriers++;
  });
}

bool elect_sync() {
  ElectedLane mine{false};
  collective(Op::ElectSync, SIMT_CALLER, mine, [](Warp&, auto& lanes) {
    // Any lane, but always the same one for the same mask.
    lanes[block->elected_lane]->elected = true;
  });
  return mine.elected;
}

void red_add_f32(float* address, float value) {
  const Pc pc = SIMT_CALLER;
  if (reinterpret_cast<uintptr_t>(address) % 4)
    fail(SIMT_MISALIGNED, "address of red.add not aligned to 4 bytes (", at(pc), ")");
  if (block->launch->checked()) {
    check_atomic(address, 4, pc);
    // A relaxed red can carry a release (fence before it), and meets nothing since it returns nothing.
    if (!self->sync.released.empty()) atomic_message(self->sync, block->launch->sync_table, address);
  }
  block->stats.atomics++;
  // Blocks run on several OS threads, so it has to be atomic here as well.
  auto* word = reinterpret_cast<uint32_t*>(address);
  uint32_t before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  do {
    float sum;
    memcpy(&sum, &before, 4);
    sum += value;
    memcpy(&after, &sum, 4);
  } while (!__atomic_compare_exchange_n(word, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  yield_sometimes();
}

uint32_t atom_add_u32(uint32_t* address, uint32_t value) {
  const Pc pc = SIMT_CALLER;
  if (reinterpret_cast<uintptr_t>(address) % 4)
    fail(SIMT_MISALIGNED, "address of atom.add not aligned to 4 bytes (", at(pc), ")");
  if (block->launch->checked()) check_atomic(address, 4, pc);
  block->stats.atomics++;
  // The message goes before the value: another OS thread that sees the new value finds the message.
  if (block->launch->checked()) atomic_message(self->sync, block->launch->sync_table, address);
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

void fence_acq_rel_gpu() {
  if (dropped("fence.acq_rel.gpu", SIMT_CALLER)) return;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (block->launch->checked()) fence(self->sync, block->global_clock, uint32_t(block->linear));
}

}  // namespace ptx
