#include "race.hpp"

#include <algorithm>
#include <cstring>

#include "state.hpp"

namespace simt {
namespace {

// Who read, beside the lane numbers 0..31.
constexpr int WHOLE_WARP = 32;     // a warp-wide instruction
constexpr int SEVERAL_LANES = 33;  // more than one lane since the warp's last barrier

uint64_t write_key(CellState state, uint32_t thread, uint32_t clock) {
  return uint64_t(clock) << 32 | thread << 8 | uint64_t(state);
}
CellState state_of(uint64_t key) { return CellState(key & 0xff); }
uint32_t thread_of(uint64_t key) { return key >> 8 & 0xffffff; }
uint32_t clock_of(uint64_t key) { return key >> 32; }

// 26 bits of clock: 67 million barriers of one block.
uint64_t read_stamp(uint32_t clock, int lane, Pc pc) { return uint64_t(clock) << 38 | uint64_t(lane) << 32 | pc; }
uint32_t read_clock(uint64_t stamp) { return stamp >> 38; }
int read_lane(uint64_t stamp) { return int(stamp >> 32 & 63); }
Pc read_pc(uint64_t stamp) { return Pc(stamp); }

// Is the read `stamp` by `reader_warp` ordered before what `writer` does now?
bool read_is_ordered(uint64_t stamp, int reader_warp, const Thread& writer) {
  const std::vector<uint32_t>& seen = writer.warp->clock.seen;
  const bool same_warp = writer.warp->id == reader_warp;
  const int lane = read_lane(stamp);
  // A warp-wide read is over, for all its lanes, before any lane does anything else.
  if (same_warp && (lane == WHOLE_WARP || lane == writer.lane)) return true;
  const int witness = lane < LANES ? lane : 0;  // barriers are warp-wide: lanes of a warp become known together
  return seen[reader_warp * LANES + witness] >= read_clock(stamp);
}

}  // namespace

std::string thread_name(uint32_t thread) { return text("warp ", thread / LANES, " lane ", thread % LANES); }

void poison(char* memory, size_t bytes) { memset(memory, POISON, bytes); }

void join(Warp* const* warps, size_t count) {
  std::vector<uint32_t>& common = warps[0]->clock.seen;
  for (size_t i = 1; i < count; i++) {
    const std::vector<uint32_t>& other = warps[i]->clock.seen;
    for (size_t t = 0; t < common.size(); t++) common[t] = std::max(common[t], other[t]);
  }
  for (size_t i = 0; i < count; i++) {
    WarpClock& clock = warps[i]->clock;
    std::fill_n(common.begin() + warps[i]->id * LANES, LANES, clock.now++);
  }
  for (size_t i = 1; i < count; i++) warps[i]->clock.seen = common;
}

void ShadowMemory::reset(uint32_t shared_bytes, int warps) {
  cells_ = (shared_bytes + CELL_BYTES - 1) / CELL_BYTES;
  warps_ = warps;
  keys_.assign(cells_, write_key(CellState::Uninitialised, 0, 0));
  write_pcs_.assign(cells_, 0);
  readers_.assign(size_t(cells_) * warps, 0);
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
  if (state_of(key) == CellState::Pending) {
    const Thread& issuer = block->threads[thread_of(key)];
    const size_t committed = issuer.copies.size() - issuer.uncommitted;
    bool open = false;
    for (size_t i = committed; i < issuer.copies.size(); i++)
      open |= offset >= issuer.copies[i].offset && offset < issuer.copies[i].offset + issuer.copies[i].bytes;
    fail(SIMT_PENDING_COPY, "read of shared memory offset ", offset, " (", at(pc),
         ") while the asynchronous copy to it by ", thread_name(thread_of(key)), " (", at(write_pcs_[cell]),
         ") is in flight", open ? ", its group not committed" : "");
  }
  const uint32_t writer = thread_of(key);
  const bool own = lane < LANES && int(writer) == warp.id * LANES + lane;
  if (own || warp.clock.seen[writer] >= clock_of(key)) return;
  report("read", cell, pc, text("the write by ", thread_name(writer), " (", at(write_pcs_[cell]), ")"));
}

void ShadowMemory::record_read(const Warp& warp, int lane, uint32_t first, uint32_t last, Pc pc) {
  uint64_t* stamps = &readers_[size_t(warp.id) * cells_];
  const uint64_t mine = read_stamp(warp.clock.now, lane, pc);
  for (uint32_t c = first; c <= last; c++) {
    const uint64_t before = stamps[c];
    // A read since the last barrier by another lane must not be forgotten over this one.
    if ((before ^ mine) >> 38 == 0 && before >> 32 != mine >> 32 && read_lane(before) != WHOLE_WARP) {
      if (lane != WHOLE_WARP) stamps[c] = read_stamp(warp.clock.now, SEVERAL_LANES, pc);
    } else {
      stamps[c] = mine;
    }
  }
}

void ShadowMemory::read(const Thread& reader, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  uint64_t good = ~uint64_t(0);
  for (uint32_t c = first; c <= last; c++)
    if (keys_[c] != good) check_written(*reader.warp, reader.lane, good = keys_[c], c, pc);
  record_read(*reader.warp, reader.lane, first, last, pc);
}

void ShadowMemory::read_by_warp(const Warp& warp, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  uint64_t good = ~uint64_t(0);
  for (uint32_t c = first; c <= last; c++)
    if (keys_[c] != good) check_written(warp, WHOLE_WARP, good = keys_[c], c, pc);
  record_read(warp, WHOLE_WARP, first, last, pc);
}

void ShadowMemory::check_readers(const Thread& writer, uint32_t first, uint32_t last, Pc pc) {
  for (int w = 0; w < warps_; w++) {
    uint64_t* stamps = &readers_[size_t(w) * cells_];
    uint64_t good = 0;
    for (uint32_t c = first; c <= last; c++) {
      const uint64_t stamp = stamps[c];
      if (stamp == good) continue;
      if (stamp && !read_is_ordered(stamp, w, writer)) {
        const int lane = read_lane(stamp);
        const std::string reader = text("warp ", w, lane < LANES ? text(" lane ", lane) : "");
        report("write", c, pc, text("the read by ", reader, " (", at(read_pc(stamp)), ")"));
      }
      good = stamp;
    }
    std::fill(stamps + first, stamps + last + 1, 0);
  }
}

void ShadowMemory::write_as(CellState state, const Thread& writer, uint32_t offset, uint32_t bytes, Pc pc) {
  const uint32_t first = offset / CELL_BYTES, last = (offset + bytes - 1) / CELL_BYTES;
  const std::vector<uint32_t>& seen = writer.warp->clock.seen;
  uint64_t good = ~uint64_t(0);
  for (uint32_t c = first; c <= last; c++) {
    const uint64_t key = keys_[c];
    if (key == good) continue;
    good = key;
    if (state_of(key) == CellState::Uninitialised) continue;
    const uint32_t earlier = thread_of(key);
    if (state_of(key) == CellState::Pending)
      fail(SIMT_PENDING_COPY, "write of shared memory offset ", c * CELL_BYTES, " (", at(pc),
           ") while the asynchronous copy to it by ", thread_name(earlier), " (", at(write_pcs_[c]), ") is in flight");
    if (earlier != writer.id && seen[earlier] < clock_of(key))
      report("write", c, pc, text("the write by ", thread_name(earlier), " (", at(write_pcs_[c]), ")"));
  }
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
