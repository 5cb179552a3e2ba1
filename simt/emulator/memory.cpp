#include "memory.hpp"

#include <algorithm>

namespace simt {
namespace {

enum class Access { Read, AsyncRead, Write, Atomic };

bool writes(Access access) { return access == Access::Write || access == Access::Atomic; }

const char* word_for(Access access) {
  switch (access) {
    case Access::Read: return "read";
    case Access::AsyncRead: return "read by an asynchronous copy";
    case Access::Write: return "write";
    case Access::Atomic: return "atomic";
  }
  return "access";
}

// How near to a buffer a stray address must be to be blamed on it.
constexpr ptrdiff_t NEAR = 1 << 20;

[[noreturn]] void report_stray(const char* p, size_t bytes, Access access, Pc pc) {
  const std::string what = text("global ", word_for(access), " of ", bytes, " bytes (", at(pc), ")");
  const Region* nearest = nullptr;
  ptrdiff_t least = NEAR, past = 0;
  for (const Region& region : block->launch->regions) {
    const ptrdiff_t before = region.begin - p, after = p + bytes - region.end;
    if (std::max(before, after) >= least) continue;
    least = std::max(before, after);
    past = after;
    nearest = &region;
  }
  if (!nearest) fail(SIMT_GLOBAL_BOUNDS, what, " out of bounds: no buffer near it");
  fail(SIMT_GLOBAL_BOUNDS, what, " out of bounds: ", least, " bytes ",
       past == least ? "past the end" : "before the start", " of `", nearest->name, "`");
}

void count(SimtBufferStats& stats, Access access, size_t bytes) {
  switch (access) {
    case Access::Read: stats.read += bytes; break;
    case Access::AsyncRead: stats.read_async += bytes; break;
    case Access::Write: stats.written += bytes; break;
    case Access::Atomic: stats.atomic += bytes; break;
  }
}

// The buffer that holds the access, the last one used first. Buffers may overlap (one passed twice, or in place): a
// write belongs to a writable one if there is one.
const Region* find_region(const char* p, size_t bytes, Access access) {
  Block& b = *block;
  const std::vector<Region>& regions = b.launch->regions;
  auto holds = [&](size_t i) { return p >= regions[i].begin && p + bytes <= regions[i].end; };
  if (holds(b.last_region) && (!writes(access) || regions[b.last_region].writable)) return &regions[b.last_region];
  const Region* read_only = nullptr;
  for (size_t i = 0; i < regions.size(); i++) {
    if (!holds(i)) continue;
    b.last_region = i;
    if (!writes(access) || regions[i].writable) return &regions[i];
    read_only = &regions[i];
  }
  return read_only;
}

void global_access(const char* p, size_t bytes, Access access, Pc pc) {
  Block& b = *block;
  const Region* found = find_region(p, bytes, access);
  if (!found && access == Access::Read && in_constants(p, bytes)) return;
  if (!found) report_stray(p, bytes, access, pc);
  const Region& region = *found;
  const size_t offset = p - region.begin;
  if (writes(access) && !region.writable)
    fail(SIMT_READ_ONLY, word_for(access), " to the read-only buffer `", region.name, "` at byte ", offset, " (",
         at(pc), ")");
  count(b.buffer_stats[b.last_region], access, bytes);
  if (!region.shadow) return;
  const GlobalActor actor{uint32_t(b.linear), *self, b.global_clock};
  const GlobalConflict conflict = writes(access)
                                      ? region.shadow->write(offset, bytes, actor, pc, access == Access::Atomic)
                                      : region.shadow->read(offset, bytes, actor, pc);
  if (!conflict.against.empty())
    fail(conflict.same_block ? SIMT_RACE : SIMT_BLOCK_RACE, conflict.same_block ? "race: " : "race between blocks: ",
         word_for(access), " of `", region.name, "` at byte ", offset, " (", at(pc), ") is not ordered after ",
         conflict.against);
}

void shared_access(uint32_t offset, size_t bytes, bool write, Pc pc) {
  Block& b = *block;
  // A cell has one writer. A single byte may be read, as one of its cell.
  if (write && bytes < CELL_BYTES)
    fail(SIMT_UNSUPPORTED, "the emulator does not follow writes of single bytes of shared memory (", at(pc), ")");
  if (write) b.shadow.write(*self, offset, uint32_t(bytes), pc);
  else b.shadow.read(*self, offset, uint32_t(bytes), pc);
  self->warp->banks.add(BankWindow::Kind::Plain, self->lane, pc, offset, uint32_t(bytes));
}

}  // namespace

void plain_access(const void* address, size_t bytes, bool write, bool natural, Pc pc) {
  if (!block->launch->checked()) return;
  Block& b = *block;
  const char* p = static_cast<const char*>(address);
  if (p >= self->stack && p < self->stack + STACK_BYTES) return check_guarded(self->guarded, p, bytes, write, pc);

  if (natural && reinterpret_cast<uintptr_t>(p) % bytes)
    fail(SIMT_MISALIGNED, write ? "write" : "read", " of ", bytes, " bytes at an address not aligned to them (",
         at(pc), ")");
  if (p >= b.shared && p + bytes <= b.shared + b.shared_bytes)
    return shared_access(uint32_t(p - b.shared), bytes, write, pc);
  if (p >= b.shared - SHARED_MARGIN && p < b.shared + b.shared_bytes + SHARED_MARGIN)
    fail(SIMT_SHARED_BOUNDS, "shared memory ", write ? "write" : "read", " of ", bytes, " bytes at offset ",
         p - b.shared, ", the block has ", b.shared_bytes, " bytes (", at(pc), ")");
  if (p >= b.stacks - STACK_BYTES && p < b.stacks + b.threads.size() * STACK_BYTES) {
    if (static_cast<const char*>(__builtin_frame_address(0)) < self->stack) fail_for_overflow();
    fail(SIMT_FOREIGN_STACK, write ? "write to" : "read of", " the local memory of thread ",
         (p - b.stacks) / STACK_BYTES, " (", at(pc), ")");
  }
  global_access(p, bytes, write ? Access::Write : Access::Read, pc);
}

void check_async_read(const void* address, size_t bytes, Pc pc) {
  global_access(static_cast<const char*>(address), bytes, Access::AsyncRead, pc);
}

void check_async_write(const void* address, size_t bytes, Pc pc) {
  global_access(static_cast<const char*>(address), bytes, Access::Write, pc);
}

void check_atomic(const void* address, size_t bytes, Pc pc) {
  global_access(static_cast<const char*>(address), bytes, Access::Atomic, pc);
}

uint32_t shared_offset(uint32_t address, uint32_t bytes, const char* what, Pc pc) {
  const Block& b = *block;
  const int64_t offset = int64_t(address) - SHARED_BASE;
  if (offset < 0 || offset + bytes > b.shared_bytes)
    fail(SIMT_SHARED_BOUNDS, what, " at shared memory offset ", offset, ", the block has ", b.shared_bytes, " bytes (",
         at(pc), ")");
  return uint32_t(offset);
}

}  // namespace simt
