// Kernels are compiled with -fsanitize=thread and never linked with its run-time library: these are its functions, and
// they bring every load and store of a kernel here, without a macro or a wrapper type in kernel code.
#include <cstring>

#include "memory.hpp"

#define SIMT_HOOK extern "C" __attribute__((visibility("default")))

// The caller's site is looked up only for what is checked.
#define SIMT_ACCESS(p, bytes, write, natural)                                                                          \
  (simt::is_unguarded_local(p) ? void() : simt::plain_access(p, bytes, write, natural, SIMT_CALLER))

// One size of access: aligned as its type promises, or not.
#define SIMT_HOOKS_OF_SIZE(bytes)                                                                                      \
  SIMT_HOOK void __tsan_read##bytes(void* p) { SIMT_ACCESS(p, bytes, false, true); }                                    \
  SIMT_HOOK void __tsan_write##bytes(void* p) { SIMT_ACCESS(p, bytes, true, true); }                                    \
  SIMT_HOOK void __tsan_unaligned_read##bytes(void* p) { SIMT_ACCESS(p, bytes, false, false); }                         \
  SIMT_HOOK void __tsan_unaligned_write##bytes(void* p) { SIMT_ACCESS(p, bytes, true, false); }

SIMT_HOOKS_OF_SIZE(1)
SIMT_HOOKS_OF_SIZE(2)
SIMT_HOOKS_OF_SIZE(4)
SIMT_HOOKS_OF_SIZE(8)
SIMT_HOOKS_OF_SIZE(16)

SIMT_HOOK void __tsan_read_range(void* p, size_t n) { SIMT_ACCESS(p, n, false, false); }
SIMT_HOOK void __tsan_write_range(void* p, size_t n) { SIMT_ACCESS(p, n, true, false); }

SIMT_HOOK void* __tsan_memcpy(void* to, const void* from, size_t n) {
  SIMT_ACCESS(from, n, false, false);
  SIMT_ACCESS(to, n, true, false);
  return memcpy(to, from, n);
}
SIMT_HOOK void* __tsan_memset(void* to, int value, size_t n) {
  SIMT_ACCESS(to, n, true, false);
  return memset(to, value, n);
}

// What else the instrumentation may call.
SIMT_HOOK void __tsan_init() {}
SIMT_HOOK void __tsan_func_entry(void*) {}
SIMT_HOOK void __tsan_func_exit() {}
