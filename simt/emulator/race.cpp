#include "race.hpp"

#include <algorithm>
#include <cstring>

#include "stamps.hpp"
#include "state.hpp"

namespace simt {
namespace {

// Is the read `stamp` by `reader_warp` ordered before what `writer` does now?
bool read_is_ordered(uint64_t stamp, int reader_warp, const Thread& writer) {
  const int lane = read_lane(stamp), first = reader_warp * LANES;
  const uint32_t time = read_clock(stamp);
  if (lane < LANES) return sees(writer, uint32_t(first + lane), time);
  // A warp-wide read is over, for all its lanes, before any lane does anything else: word from one of them will do.
  if (lane == WHOLE_WARP && writer.warp->id == reader_warp) return true;
  const bool any = lane == WHOLE_WARP;
  for (int l = 0; l < LANES; l++)
    if (sees(writer, uint32_t(first + l), time) == any) return any;
  return !any;
}

}  // namespace

std::string actor_name(uint32_t actor) {
  const uint32_t threads = uint32_t(block->threads.size());
  if (actor < threads) return text("warp ", actor / LANES, " lane ", actor % LANES);
  return text("a bulk copy of mbarrier ", actor - threads);
}

void poison(char* memory, size_t bytes) { memset(memory, POISON, bytes); }

void ShadowMemory::reset(uint32_t shared_bytes, size_t warps) {
  cells_ = (shared_bytes + CELL_BYTES - 1) / CELL_BYTES;
  keys_.assign(cells_, write_key(CellState::Uninitialised, 0, 0));
  write_pcs_.assign(cells_, 0);
  read_by_.assign(cells_, 0);
  if (readers_.size() < cells_ * warps) readers_.resize(cells_ * warps);  // large, and nothing reads what no warp has written
  holders_.clear();
}

void ShadowMemory::report(const char* access, uint32_t cell, Pc pc, const std::string& against) {
  fail(SIMT_RACE, "race: ", access, " of shared memory offset ", cell * CELL_BYTES, " (", at(pc),
       ") is not ordered after ", against);
}

// `lane` is WHOLE_WARP for a warp-wide read.
void ShadowMemory::check_written(const Warp& warp, int lane, uint64_t key, uint32_t cell, Pc pc) {
  const uint32_t offset = cell * CELL_BYTES;
  if (state_of(key) == CellState::Uninitialised)
    fail(SIMT_UNINITIALISED, "read of uninitialised shared memory offset ", offset, " (", at(pc), ")");
  if (state_of(key) == CellState::Mbarrier)
    fail(SIMT_MBARRIER, "plain read (", at(pc), ") of the mbarrier at shared memory offset ", offset);
  if (state_of(key) == CellState::Pending) {
    const Thread& issuer = block->threads[actor_of(key)];
    const size_t committed = issuer.copies.size() - issuer.uncommitted;
    bool open = false;
    for (size_t i = committed; i < issuer.copies.size(); i++)
      open |= offset >= issuer.copies[i].offset && offset < issuer.copies[i].offset + issuer.copies[i].bytes;
    fail(SIMT_PENDING_COPY, "read of shared memory offset ", offset, " (", at(pc),
         ") while the asynchronous copy to it by ", actor_name(actor_of(key)), " (", at(write_pcs_[cell]),
         ") is in flight", open ? ", its group not committed" : "");
  }
  const uint32_t writer = actor_of(key);
  const bool ordered = lane < LANES ? sees(block->threads[warp.id * LANES + lane], writer, clock_of(key))
                                    : sees(warp, writer, clock_of(key));
  if (ordered) return;
  report("read", cell, pc, text("the write by ", actor_name(writer), " (", at(write_pcs_[cell]), ")"));
}

void ShadowMemory::record_read(const Warp& warp, int lane, uint32_t first, uint32_t last, Pc pc) {
  uint64_t* stamps = &readers_[size_t(warp.id) * cells_];
  const uint64_t mine = read_stamp(warp.clock.now, lane, pc);
  for (uint32_t c = first; c <= last; c++) {
    const uint64_t before = read_by_[c] >> warp.id & 1 ? stamps[c] : 0;
    read_by_[c] |= 1u << warp.id;
    const int earlier = read_lane(before);
    // A read since the last barrier by another lane must not be forgotten over this one.
    if (read_clock(before) < warp.clock.joined || earlier == lane || earlier == WHOLE_WARP) stamps[c] = mine;
    else stamps[c] = read_stamp(warp.clock.now, lane == WHOLE_WARP ? earlier : SEVERAL_LANES, pc);
  }
}

void ShadowMemory::read(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  uint64_t good = NO_WRITE;
  for (uint32_t c = first; c <= last; c++)
    if (keys_[c] != good) check_written(*reader.warp, reader.lane, good = keys_[c], c, pc);
  record_read(*reader.warp, reader.lane, first, last, pc);
}

void ShadowMemory::read_by_warp(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  uint64_t good = NO_WRITE;
  for (uint32_t c = first; c <= last; c++)
    if (keys_[c] != good) check_written(warp, WHOLE_WARP, good = keys_[c], c, pc);
  record_read(warp, WHOLE_WARP, first, last, pc);
}

void ShadowMemory::check_readers(const Thread& writer, uint32_t first, uint32_t last, Pc pc) {
  uint32_t readers = 0;
  for (uint32_t c = first; c <= last; c++) readers |= read_by_[c];
  for (; readers; readers &= readers - 1) {
    const int w = __builtin_ctz(readers);
    const uint64_t* stamps = &readers_[size_t(w) * cells_];
    uint64_t good = 0;
    for (uint32_t c = first; c <= last; c++) {
      const uint64_t stamp = stamps[c];
      if (stamp == good || !(read_by_[c] >> w & 1)) continue;
      if (!read_is_ordered(stamp, w, writer)) {
        const int lane = read_lane(stamp);
        const std::string reader = text("warp ", w, lane < LANES ? text(" lane ", lane) : "");
        report("write", c, pc, text("the read by ", reader, " (", at(read_pc(stamp)), ")"));
      }
      good = stamp;
    }
  }
  std::fill(&read_by_[first], &read_by_[last] + 1, 0);
}

void ShadowMemory::write_as(CellState state, const Thread& writer, uint32_t offset, uint32_t bytes, Pc pc,
                            bool in_proxy) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  const uint32_t threads = uint32_t(block->threads.size());
  uint64_t good = NO_WRITE;
  for (uint32_t c = first; c <= last; c++) {
    const uint64_t key = keys_[c];
    if (key == good) continue;
    good = key;
    if (state_of(key) == CellState::Uninitialised) continue;
    const uint32_t earlier = actor_of(key);
    if (state_of(key) == CellState::Mbarrier)
      fail(SIMT_MBARRIER, "write (", at(pc), ") over the mbarrier at shared memory offset ", c * CELL_BYTES,
           ", initialised at (", at(write_pcs_[c]), ")");
    if (state_of(key) == CellState::Pending)
      fail(SIMT_PENDING_COPY, "write of shared memory offset ", c * CELL_BYTES, " (", at(pc),
           ") while the asynchronous copy to it by ", actor_name(earlier), " (", at(write_pcs_[c]), ") is in flight");
    if (!sees(writer, earlier, clock_of(key)))
      report("write", c, pc, text("the write by ", actor_name(earlier), " (", at(write_pcs_[c]), ")"));
    if (in_proxy && earlier < threads && !sees_in_proxy(writer, earlier, clock_of(key)))
      report_proxy("write", c, pc, earlier);
  }
  if (!holders_.empty()) check_holders(first, last, pc);
  check_readers(writer, first, last, pc);
  std::fill(&keys_[first], &keys_[last] + 1, write_key(state, writer.id, writer.warp->clock.now));
  std::fill(&write_pcs_[first], &write_pcs_[last] + 1, pc);
}

void ShadowMemory::write(const Thread& writer, uint32_t offset, uint32_t bytes, Pc pc) {
  write_as(CellState::Valid, writer, offset, bytes, pc);
}

void ShadowMemory::begin_copy(const Thread& issuer, uint32_t offset, uint32_t bytes, Pc pc) {
  write_as(CellState::Pending, issuer, offset, bytes, pc);
}

void ShadowMemory::land(const Thread& issuer, uint32_t offset, uint32_t bytes) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  std::fill(&keys_[first], &keys_[last] + 1, write_key(CellState::Valid, issuer.id, issuer.warp->clock.now));
}

}  // namespace simt
