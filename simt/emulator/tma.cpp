// The source is read, and the destination written, when the copy lands; from the issue until then the destination is
// poisoned. Elements outside of the tensor are zeros, and their bytes count like any others.
#include "tma.hpp"

#include <algorithm>
#include <cstring>

#include "../../kernels/ptx/contract.h"
#include "memory.hpp"
#include "scheduler.hpp"

namespace simt {
namespace {

void land(const BulkCopy& copy) {
  Block& b = *block;
  Mbarrier& barrier = b.mbarriers[copy.mbarrier];
  uint32_t to = copy.address;
  auto put = [&](const char* source, int64_t elements) {
    for (int64_t i = 0; i < elements; i++, to += 2) {
      char* element = b.shared + (copy.layout.place(to) - SHARED_BASE);
      if (source) memcpy(element, source + 2 * i, 2);
      else memset(element, 0, 2);
    }
  };
  for_each_row(copy.layout, copy.corner, [&](const char* source, int64_t before, int64_t inside, int64_t after) {
    put(nullptr, before);
    put(source, inside);
    put(nullptr, after);
  });
  const uint32_t bytes = copy.layout.box_bytes();
  if (b.launch->checked()) b.shadow.land_bulk(barrier.actor, barrier.phase + 1, copy.address - SHARED_BASE, bytes);
  complete_bytes(barrier, bytes);
}

}  // namespace

TensorLayout layout_of(const ptx::TensorMap* map, uint32_t address, const char* what, Pc pc) {
  TensorLayout layout;
  static_assert(sizeof(ptx::TensorMap) == 128 && sizeof layout <= sizeof(ptx::TensorMap));
  if (reinterpret_cast<uintptr_t>(map) % 64) fail(SIMT_MISALIGNED, "tensor map not aligned to 64 bytes (", at(pc), ")");
  memcpy(&layout, map, sizeof layout);
  if (layout.magic != TENSOR_MAP_MAGIC)
    fail(SIMT_UNSUPPORTED, what, " with a tensor map that the emulator did not encode (", at(pc), ")");
  const bool swizzled = layout.swizzle == Swizzle::Bytes128;
  const uint32_t alignment = swizzled ? 1024 : 128;
  if (address % alignment)
    fail(SIMT_MISALIGNED, "shared memory of ", what, " not aligned to ", alignment, " bytes (", at(pc), ")");
  // A narrower box leaves holes in the swizzled rows.
  if (swizzled && layout.box[0] != 64)
    fail(SIMT_UNSUPPORTED, what, " with a swizzle of 128 bytes and rows of ", 2 * layout.box[0], " bytes (", at(pc), ")");
  return layout;
}

bool land_bulk_copy() {
  std::vector<BulkCopy>& copies = block->bulk_copies;
  if (copies.empty()) return false;
  const auto chosen = copies.begin() + ptrdiff_t(block->random() % copies.size());
  const BulkCopy copy = *chosen;
  copies.erase(chosen);
  land(copy);
  return true;
}

}  // namespace simt

namespace ptx {

using namespace simt;

void cp_async_bulk_tensor_4d(uint32_t dst, const TensorMap* map, uint32_t barrier, int32_t c0, int32_t c1, int32_t c2,
                             int32_t c3) {
  const Pc pc = SIMT_CALLER;
  constexpr const char* NAME = "cp.async.bulk.tensor";
  Block& b = *block;
  BulkCopy copy;
  copy.layout = layout_of(map, dst, NAME, pc);
  Mbarrier& target = mbarrier_at(barrier, NAME, pc);
  copy.address = dst;
  const int32_t corner[4] = {c0, c1, c2, c3};
  std::copy(corner, corner + 4, copy.corner);
  copy.mbarrier = target.actor - b.threads.size();
  copy.pc = pc;
  const uint32_t bytes = copy.layout.box_bytes(), offset = shared_offset(dst, bytes, NAME, pc);
  if (b.launch->checked()) {
    if (!target.fenced_at || !sees(*self, target.initialiser, target.fenced_at))
      fail(SIMT_PROXY, NAME, " (", at(pc), ") completes at the mbarrier at shared memory offset ", target.offset,
           ", whose initialisation no fence.mbarrier_init has shown to the async proxy");
    for_each_row(copy.layout, copy.corner, [&](const char* source, int64_t, int64_t inside, int64_t) {
      if (inside) check_async_read(source, size_t(2 * inside), pc);
    });
    b.shadow.begin_bulk_copy(*self, offset, bytes, pc);
  }
  poison(b.shared + offset, bytes);
  b.stats.bulk_bytes += bytes;
  b.bulk_copies.push_back(copy);
  yield_sometimes();
}

}  // namespace ptx
