// The kernels that the stand-in driver runs: a table, ended by an entry without a name, in a translation unit of its
// own that build_support.rs writes.
#pragma once
#include <cstddef>

struct SimtRegisteredKernel {
  const char* name;  // as in the image
  void (*entry)(const void* params);
  size_t params_bytes;
};

extern "C" const SimtRegisteredKernel simt_registered_kernels[];
