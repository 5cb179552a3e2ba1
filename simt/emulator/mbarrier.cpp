#include "mbarrier.hpp"

#include <cstdlib>

#include "../../kernels/ptx/contract.h"
#include "memory.hpp"
#include "scheduler.hpp"

namespace simt {
namespace {

constexpr uint32_t MBARRIER_BYTES = 8;
constexpr uint32_t MAX_COUNT = (1 << 20) - 1;  // "mbarrier: contents of the object"

void complete_if_due(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  raise(barrier.arriving.seen, barrier.actor, barrier.phase + 1);  // its bulk copies of this phase
  barrier.done = std::move(barrier.arriving);
  barrier.arriving.clear();
  barrier.phase++;
  barrier.pending = barrier.count;
  for (Thread* thread : barrier.waiting) wake_lane(*thread);
  barrier.waiting.clear();
}

void arrive(uint32_t address, uint32_t bytes, const char* what, Pc pc) {
  Mbarrier& barrier = mbarrier_at(address, what, pc);
  if (!barrier.pending)
    fail(SIMT_MBARRIER, what, " (", at(pc), ") at the mbarrier at shared memory offset ", barrier.offset,
         ": all of the ", barrier.count, " arrivals of its phase have come");
  barrier.bytes += bytes;
  if (std::llabs(barrier.bytes) > MAX_COUNT)
    fail(SIMT_MBARRIER, what, " (", at(pc), "): more than 2^20 - 1 bytes outstanding");
  if (block->launch->checked()) release(*self, barrier.arriving);
  barrier.pending--;
  complete_if_due(barrier);
  yield_sometimes();
}

}  // namespace

Mbarrier& mbarrier_at(uint32_t address, const char* what, Pc pc) {
  const uint32_t offset = shared_offset(address, MBARRIER_BYTES, what, pc);
  for (Mbarrier& barrier : block->mbarriers) {
    if (barrier.offset != offset) continue;
    if (block->launch->checked()) block->shadow.use_mbarrier(*self, offset, pc);
    return barrier;
  }
  fail(SIMT_MBARRIER, what, " (", at(pc), "): no mbarrier has been initialised at shared memory offset ", offset);
}

void complete_bytes(Mbarrier& barrier, uint32_t bytes) {
  barrier.bytes -= bytes;
  complete_if_due(barrier);
}

void fence_initialisations(Thread& thread) {
  for (Mbarrier& barrier : block->mbarriers)
    if (barrier.initialiser == thread.id && !barrier.fenced_at) barrier.fenced_at = thread.warp->clock.now;
  thread.warp->clock.now++;
}

std::string mbarrier_report() {
  std::string report;
  for (const Mbarrier& barrier : block->mbarriers)
    if (!barrier.waiting.empty())
      report += text("\n    mbarrier at shared memory offset ", barrier.offset, ": phase ", barrier.phase, " lacks ",
                     barrier.pending, " of ", barrier.count, " arrivals and ", barrier.bytes, " bytes");
  return report;
}

}  // namespace simt

namespace ptx {

using namespace simt;

void mbarrier_init(uint32_t barrier, uint32_t count) {
  const Pc pc = SIMT_CALLER;
  if (barrier % MBARRIER_BYTES) fail(SIMT_MISALIGNED, "mbarrier not aligned to 8 bytes (", at(pc), ")");
  if (count == 0 || count > MAX_COUNT)
    fail(SIMT_MBARRIER, "mbarrier for ", count, " arrivals: must be 1 to 2^20 - 1 (", at(pc), ")");
  const uint32_t offset = shared_offset(barrier, MBARRIER_BYTES, "mbarrier.init", pc);
  if (block->launch->checked()) block->shadow.init_mbarrier(*self, offset, pc);
  Mbarrier made;
  made.offset = offset;
  made.actor = uint32_t(block->threads.size() + block->mbarriers.size());
  made.count = made.pending = count;
  made.initialiser = self->id;
  block->mbarriers.push_back(made);
}

void fence_mbarrier_init() {
  if (dropped("fence.mbarrier_init", SIMT_CALLER)) return;
  fence_initialisations(*self);
}

void mbarrier_arrive(uint32_t barrier) {
  const Pc pc = SIMT_CALLER;
  if (dropped("mbarrier.arrive", pc)) return;
  arrive(barrier, 0, "mbarrier.arrive", pc);
}

void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  const Pc pc = SIMT_CALLER;
  if (dropped("mbarrier.arrive.expect_tx", pc)) return;
  arrive(barrier, bytes, "mbarrier.arrive.expect_tx", pc);
}

bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity) {
  const Pc pc = SIMT_CALLER;
  if (dropped("mbarrier.try_wait", pc)) return true;
  Mbarrier& barrier = mbarrier_at(address, "mbarrier.try_wait", pc);
  if (parity > 1) fail(SIMT_MBARRIER, "mbarrier.try_wait for parity ", parity, " (", at(pc), ")");
  // The hardware gives up after a while, whatever the phase: callers have to loop.
  if (block->random() % 16 == 0) {
    yield_to_any();
    return false;
  }
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(self);
    block_self("mbarrier.try_wait", pc);
  }
  if (block->launch->checked()) acquire(*self, barrier.done);
  return true;
}

void fence_proxy_async_shared_cta() {
  if (dropped("fence.proxy.async", SIMT_CALLER)) return;
  fence_initialisations(*self);
  if (block->launch->checked()) publish_to_proxy(*self);
}

}  // namespace ptx
