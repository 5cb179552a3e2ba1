// Bulk tensor copies in flight, and bulk stores ("Data Movement and Conversion Instructions: cp.async.bulk.tensor").
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tensor_map.hpp"

namespace ptx {
struct TensorMap;
}

namespace simt {

struct BulkCopy {
  uint32_t address;  // of the destination, in the shared window
  TensorLayout layout;
  int32_t corner[4];
  size_t mbarrier;  // index
  uint32_t pc;
};

// One store. Shared memory is read when the thread waits for that; global memory is written when the thread exits.
struct BulkStore {
  uint32_t address;  // of the source, in the shared window
  TensorLayout layout;
  int32_t corner[4];
  uint32_t pc;
  std::vector<uint16_t> taken;  // what was read, once it was
};

// Of one thread.
struct BulkStores {
  std::vector<BulkStore> unread, written;  // oldest first; `written` have been read
  std::vector<size_t> groups;              // sizes of the committed groups that are yet to be read
  size_t uncommitted = 0;                  // the last ones of `unread`
};

// What the map says, once it is fit for a copy from or to this window address.
TensorLayout layout_of(const ptx::TensorMap* map, uint32_t address, const char* what, uint32_t pc);

// The running thread exits.
void finish_bulk_stores();

// Calls `row(source, before, inside, after)` for each row of the box in the order of shared memory: where its first
// element inside of the tensor lies, and how many elements lie before, in and behind the tensor.
template <class Row>
void for_each_row(const TensorLayout& t, const int32_t (&corner)[4], Row row) {
  for (int64_t w = corner[3]; w < int64_t(corner[3]) + t.box[3]; w++)
    for (int64_t z = corner[2]; z < int64_t(corner[2]) + t.box[2]; z++)
      for (int64_t y = corner[1]; y < int64_t(corner[1]) + t.box[1]; y++) {
        const int64_t outer[3] = {y, z, w};
        bool inside = true;
        for (int i = 0; i < 3; i++) inside &= outer[i] >= 0 && outer[i] < int64_t(t.dimensions[i + 1]);
        const int64_t x = corner[0], end = x + t.box[0];
        const int64_t from = std::clamp<int64_t>(0, x, end);
        const int64_t to = std::clamp<int64_t>(int64_t(t.dimensions[0]), from, end);
        if (!inside || from == to) {
          row(nullptr, t.box[0], 0, 0);
          continue;
        }
        const char* source = t.base + 2 * from;
        for (int i = 0; i < 3; i++) source += outer[i] * int64_t(t.strides[i]);
        row(source, from - x, to - from, end - to);
      }
}

// Lands one copy, chosen by the seed; false if none is in flight. Called when no thread can run: the last moment at
// which a kernel can still depend on it.
bool land_bulk_copy();

}  // namespace simt
