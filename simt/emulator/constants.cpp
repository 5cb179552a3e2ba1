// Where a kernel's constant tables live: the read-only segments of the image that holds the emulator.
#include "memory.hpp"

#if defined(__linux__)

#include <link.h>

namespace simt {
namespace {

struct Range {
  uintptr_t begin, end;
};

int collect(dl_phdr_info* image, size_t, void* into) {
  const auto here = reinterpret_cast<uintptr_t>(&in_constants);
  std::vector<Range> found;
  bool ours = false;
  for (int i = 0; i < image->dlpi_phnum; i++) {
    const auto& segment = image->dlpi_phdr[i];
    const Range range{image->dlpi_addr + segment.p_vaddr, image->dlpi_addr + segment.p_vaddr + segment.p_memsz};
    // RELRO: tables that hold addresses, read-only once they are relocated.
    const bool relocated = segment.p_type == PT_GNU_RELRO;
    if (relocated || (segment.p_type == PT_LOAD && !(segment.p_flags & PF_W))) found.push_back(range);
    ours |= segment.p_type == PT_LOAD && here >= range.begin && here < range.end;
  }
  if (ours) *static_cast<std::vector<Range>*>(into) = found;
  return ours;
}

}  // namespace

bool in_constants(const void* address, size_t bytes) {
  static const std::vector<Range> ranges = [] {
    std::vector<Range> found;
    dl_iterate_phdr(&collect, &found);
    return found;
  }();
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (const Range& range : ranges)
    if (begin >= range.begin && begin + bytes <= range.end) return true;
  return false;
}

}  // namespace simt

#else

#include <dlfcn.h>

namespace simt {

// Without a portable list of segments, anything inside the image passes for a constant.
bool in_constants(const void* address, size_t) {
  Dl_info here, there;
  return dladdr(reinterpret_cast<const void*>(&in_constants), &here) && dladdr(address, &there) &&
         here.dli_fbase == there.dli_fbase;
}

}  // namespace simt

#endif
