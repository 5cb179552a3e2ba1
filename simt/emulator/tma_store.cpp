// Bulk stores. The source is held from the issue to the wait that covers its group, and read then, the last legal moment; a
// kernel that waits for the read alone does not know when global memory is written: that happens when the thread exits, the
// last moment again, and until then the destination is poisoned.
#include <cstring>

#include "../../kernels/ptx/contract.h"
#include "memory.hpp"
#include "scheduler.hpp"

namespace simt {
namespace {

// Calls visit(global, address, elements) for each row's part inside of the tensor, from its first element on; `address` is
// where that would lie in the shared window without a swizzle.
template <class Visit>
void for_each_part(const BulkStore& store, Visit visit) {
  uint32_t address = store.address;
  for_each_row(store.layout, store.corner, [&](const char* global, int64_t before, int64_t inside, int64_t after) {
    if (inside) visit(const_cast<char*>(global), address + 2 * uint32_t(before), size_t(inside));
    address += 2 * uint32_t(before + inside + after);
  });
}

// Calls visit(address) for each element inside of the tensor, where it lies in the shared window.
template <class Visit>
void for_each_element(const BulkStore& store, Visit visit) {
  for_each_part(store, [&](char*, uint32_t address, size_t elements) {
    for (size_t i = 0; i < elements; i++) visit(store.layout.place(address + 2 * uint32_t(i)));
  });
}

void take(BulkStore& store) {
  for_each_element(store, [&](uint32_t address) {
    const uint32_t offset = address - SHARED_BASE;
    uint16_t bits;
    memcpy(&bits, block->shared + offset, 2);
    store.taken.push_back(bits);
    if (block->launch->checked()) block->shadow.let_go(*self, offset, 2, store.pc);
  });
}

void write(const BulkStore& store) {
  const uint16_t* from = store.taken.data();
  for_each_part(store, [&](char* global, uint32_t, size_t elements) {
    memcpy(global, from, 2 * elements);
    from += elements;
  });
}

}  // namespace

void cp_async_bulk_wait_group_read(int groups_left) {
  if (dropped("cp.async.bulk.wait_group.read", SIMT_CALLER)) return;
  BulkStores& stores = self->bulk_stores;
  while (int(stores.groups.size()) > groups_left) {
    const auto end = stores.unread.begin() + ptrdiff_t(stores.groups.front());
    stores.groups.erase(stores.groups.begin());
    for (auto store = stores.unread.begin(); store != end; ++store) {
      take(*store);
      stores.written.push_back(*store);
    }
    stores.unread.erase(stores.unread.begin(), end);
  }
}

void finish_bulk_stores() {
  BulkStores& stores = self->bulk_stores;
  if (!stores.unread.empty())
    fail(SIMT_COPY_AT_EXIT, "the thread exits while ", stores.unread.size(),
         " of its bulk stores may still read shared memory, the first issued at (", at(stores.unread[0].pc), ")",
         stores.uncommitted ? ", never committed" : "");
  for (const BulkStore& store : stores.written) write(store);
}

}  // namespace simt

namespace ptx {

using namespace simt;

void cp_async_bulk_tensor_store_4d(const TensorMap* map, uint32_t src, int32_t c0, int32_t c1, int32_t c2, int32_t c3) {
  const Pc pc = SIMT_CALLER;
  constexpr const char* NAME = "cp.async.bulk.tensor to global memory";
  BulkStore store{src, layout_of(map, src, NAME, pc), {c0, c1, c2, c3}, pc, {}};
  shared_offset(src, store.layout.box_bytes(), NAME, pc);
  if (block->launch->checked())
    for_each_element(store, [&](uint32_t address) { block->shadow.hold(*self, address - SHARED_BASE, 2, pc); });
  for_each_part(store, [&](char* global, uint32_t, size_t elements) {
    if (block->launch->checked()) check_async_write(global, 2 * elements, pc);
    poison(global, 2 * elements);
  });
  BulkStores& stores = self->bulk_stores;
  stores.unread.push_back(store);
  stores.uncommitted++;
  yield_sometimes();
}

void cp_async_bulk_commit_group() {
  if (dropped("cp.async.bulk.commit_group", SIMT_CALLER)) return;
  BulkStores& stores = self->bulk_stores;
  stores.groups.push_back(stores.uncommitted);
  stores.uncommitted = 0;
}

}  // namespace ptx
