// cp.async: from its issue on the destination is poisoned and pending, and the bytes move when the thread waits for
// their group - the first and the last legal moment at once. The source is read then, too.
#include <cstring>

#include "../../kernels/ptx/contract.h"
#include "memory.hpp"
#include "scheduler.hpp"

namespace simt {
namespace {

void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t source_bytes, Pc pc) {
  if (dst % bytes)
    fail(SIMT_MISALIGNED, "destination of cp.async not aligned to its ", bytes, " bytes (", at(pc), ")");
  if (reinterpret_cast<uintptr_t>(src) % bytes)
    fail(SIMT_MISALIGNED, "source of cp.async not aligned to its ", bytes, " bytes (", at(pc), ")");
  if (source_bytes > bytes)
    fail(SIMT_GLOBAL_BOUNDS, "cp.async of ", bytes, " bytes with a src_size of ", source_bytes, " (", at(pc), ")");
  const uint32_t offset = shared_offset(dst, bytes, "cp.async", pc);
  Block& b = *block;
  if (b.launch->checked()) {
    if (source_bytes) check_async_read(src, source_bytes, pc);
    b.shadow.begin_copy(*self, offset, bytes, pc);
    self->warp->banks.add(BankWindow::Kind::CpAsync, self->lane, pc, offset, bytes);
  }
  poison(b.shared + offset, bytes);
  self->copies.push_back({offset, bytes, source_bytes, static_cast<const char*>(src), pc});
  self->uncommitted++;
}

void land(const Thread& t, const AsyncCopy& copy) {
  char* to = block->shared + copy.offset;
  if (copy.source_bytes) memcpy(to, copy.source, copy.source_bytes);
  memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  if (block->launch->checked()) block->shadow.land(t, copy.offset, copy.bytes);
}

}  // namespace

void cp_async_wait_group(int groups_left) {
  if (dropped("cp.async.wait_group", SIMT_CALLER)) return;
  Thread& t = *self;
  if (int(t.groups.size()) <= groups_left) return;
  const auto retired = t.groups.end() - groups_left;
  size_t copies = 0;
  for (auto group = t.groups.begin(); group != retired; ++group) copies += *group;
  for (size_t i = 0; i < copies; i++) land(t, t.copies[i]);
  t.copies.erase(t.copies.begin(), t.copies.begin() + copies);
  t.groups.erase(t.groups.begin(), retired);
}

}  // namespace simt

namespace ptx {

using namespace simt;

void cp_async_cg_16(uint32_t dst, const void* src, uint32_t src_size) { cp_async(dst, src, 16, src_size, SIMT_CALLER); }
void cp_async_ca_8(uint32_t dst, const void* src, uint32_t src_size) { cp_async(dst, src, 8, src_size, SIMT_CALLER); }
void cp_async_ca_4(uint32_t dst, const void* src, uint32_t src_size) { cp_async(dst, src, 4, src_size, SIMT_CALLER); }

void cp_async_commit_group() {
  if (dropped("cp.async.commit_group", SIMT_CALLER)) return;
  self->groups.push_back(self->uncommitted);
  self->uncommitted = 0;
}

}  // namespace ptx
