// Bulk tensor copies in flight ("Data Movement and Conversion Instructions: cp.async.bulk.tensor").
#pragma once
#include <cstddef>
#include <cstdint>

#include "tensor_map.hpp"

namespace simt {

struct BulkCopy {
  uint32_t address;  // of the destination, in the shared window
  TensorLayout layout;
  int32_t corner[4];
  size_t mbarrier;  // index
  uint32_t pc;
};

// Lands one copy, chosen by the seed; false if none is in flight. Called when no thread can run: the last moment at
// which a kernel can still depend on it.
bool land_bulk_copy();

}  // namespace simt
