// Kernels are compiled with -fsanitize=thread and never linked with its run-time library: these are its functions, and
// they bring every load and store of a kernel here, without a macro or a wrapper type in kernel code.
#include <cstring>

#include "memory.hpp"

#define SIMT_HOOK extern "C" __attribute__((visibility("default")))

// One size of access: aligned as its type promises, or not.
#define SIMT_HOOKS_OF_SIZE(bytes)                                                                                      \
  SIMT_HOOK void __tsan_read##bytes(void* p) { simt::plain_access(p, bytes, false, true, SIMT_CALLER); }                \
  SIMT_HOOK void __tsan_write##bytes(void* p) { simt::plain_access(p, bytes, true, true, SIMT_CALLER); }                \
  SIMT_HOOK void __tsan_unaligned_read##bytes(void* p) { simt::plain_access(p, bytes, false, false, SIMT_CALLER); }     \
  SIMT_HOOK void __tsan_unaligned_write##bytes(void* p) { simt::plain_access(p, bytes, true, false, SIMT_CALLER); }

SIMT_HOOKS_OF_SIZE(1)
SIMT_HOOKS_OF_SIZE(2)
SIMT_HOOKS_OF_SIZE(4)
SIMT_HOOKS_OF_SIZE(8)
SIMT_HOOKS_OF_SIZE(16)

SIMT_HOOK void __tsan_read_range(void* p, size_t n) { simt::plain_access(p, n, false, false, SIMT_CALLER); }
SIMT_HOOK void __tsan_write_range(void* p, size_t n) { simt::plain_access(p, n, true, false, SIMT_CALLER); }

SIMT_HOOK void* __tsan_memcpy(void* to, const void* from, size_t n) {
  simt::plain_access(from, n, false, false, SIMT_CALLER);
  simt::plain_access(to, n, true, false, SIMT_CALLER);
  return memcpy(to, from, n);
}
SIMT_HOOK void* __tsan_memset(void* to, int value, size_t n) {
  simt::plain_access(to, n, true, false, SIMT_CALLER);
  return memset(to, value, n);
}

// What else the instrumentation may call.
SIMT_HOOK void __tsan_init() {}
SIMT_HOOK void __tsan_func_entry(void*) {}
SIMT_HOOK void __tsan_func_exit() {}
