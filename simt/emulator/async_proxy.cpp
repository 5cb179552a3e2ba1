// Shared memory as the async proxy sees it: bulk copies write, wgmma reads, and both act later than they were issued.
//
// Writes and reads of one proxy are ordered like any others. Across proxies a fence is needed as well: the async proxy
// sees what a plain store wrote only after a fence.proxy.async that the store happens before ("Memory Consistency
// Model: proxies"; "wgmma: async proxy"). Who executes the fence does not matter here, as long as it lies in between.
#include <algorithm>

#include "race.hpp"
#include "stamps.hpp"
#include "state.hpp"

namespace simt {

void ShadowMemory::report_proxy(const char* access, uint32_t cell, Pc pc, uint32_t writer) {
  fail(SIMT_PROXY, access, " of shared memory offset ", cell * CELL_BYTES, " through the async proxy (", at(pc),
       ") after the plain write by ", actor_name(writer), " (", at(write_pcs_[cell]),
       ") without fence.proxy.async in between");
}

void ShadowMemory::check_holders(uint32_t first, uint32_t last, Pc pc) {
  for (uint32_t c = first; c <= last; c++) {
    const Holder& holder = holders_[c];
    if (holder.count == 0) continue;
    fail(holder.store ? SIMT_PENDING_COPY : SIMT_WGMMA, "write of shared memory offset ", c * CELL_BYTES, " (", at(pc),
         ") while the ", holder.store ? "bulk store" : "wgmma", " issued at (", at(holder.pc), ") may still read it");
  }
}

void ShadowMemory::begin_bulk_copy(const Thread& issuer, uint32_t offset, uint32_t bytes, Pc pc) {
  write_as(CellState::Pending, issuer, offset, bytes, pc, true);
}

void ShadowMemory::land_bulk(uint32_t actor, uint32_t time, uint32_t offset, uint32_t bytes) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  std::fill(&keys_[first], &keys_[last] + 1, write_key(CellState::Valid, actor, time));
}

ShadowMemory::Holder* ShadowMemory::holders() {
  if (holders_.empty()) holders_.resize(cells_);
  return holders_.data();
}

void ShadowMemory::hold(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc, uint64_t& good) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  const uint32_t threads = uint32_t(block->threads.size());
  Holder* const holders = this->holders();
  for (uint32_t c = first; c <= last; c++) {
    const uint64_t key = keys_[c];
    if (key != good) {
      check_written(warp, WHOLE_WARP, key, c, pc);
      if (actor_of(key) < threads && !sees_in_proxy(warp, actor_of(key), clock_of(key)))
        report_proxy("read", c, pc, actor_of(key));
      good = key;
    }
    holders[c] = {pc, uint16_t(holders[c].count + 1), false};
  }
}

void ShadowMemory::let_go(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  for (uint32_t c = first; c <= last; c++) holders_[c].count--;
  record_read(warp, WHOLE_WARP, first, last, pc);
}

void ShadowMemory::hold(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  const uint32_t threads = uint32_t(block->threads.size());
  Holder* const holders = this->holders();
  for (uint32_t c = first; c <= last; c++) {
    const uint64_t key = keys_[c];
    check_written(*reader.warp, reader.lane, key, c, pc);
    if (actor_of(key) < threads && !sees_in_proxy(reader, actor_of(key), clock_of(key)))
      report_proxy("read", c, pc, actor_of(key));
    holders[c] = {pc, uint16_t(holders[c].count + 1), true};
  }
}

void ShadowMemory::let_go(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  for (uint32_t c = first; c <= last; c++) holders_[c].count--;
  record_read(*reader.warp, reader.lane, first, last, pc);
}

void ShadowMemory::init_mbarrier(const Thread& writer, uint32_t offset, Pc pc) {
  write_as(CellState::Mbarrier, writer, offset, 8, pc);
}

void ShadowMemory::use_mbarrier(const Thread& user, uint32_t offset, Pc pc) {
  const uint32_t cell = offset / CELL_BYTES;
  const uint64_t key = keys_[cell];
  if (!sees(user, actor_of(key), clock_of(key)))
    report("use of the mbarrier", cell, pc,
           text("its initialisation by ", actor_name(actor_of(key)), " (", at(write_pcs_[cell]), ")"));
}

}  // namespace simt
