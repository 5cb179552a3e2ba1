// Every load and store of a kernel passes through here: which memory it touches, and whether it may.
#pragma once
#include "state.hpp"

namespace simt {

// Is an access that starts here one to the running thread's local memory, by far the most frequent, none of which is
// guarded, or of no thread of a kernel at all?
inline bool is_unguarded_local(const void* address) {
  const Thread* thread = self;
  return !thread || (size_t(static_cast<const char*>(address) - thread->stack) < STACK_BYTES && thread->guarded.empty());
}

// A plain access of the running thread, reported by the instrumentation (hooks.cpp), which has asked `is_unguarded_local`
// before. `natural` if the compiler took the address for aligned to the access.
void plain_access(const void* address, size_t bytes, bool write, bool natural, Pc pc);

// Global reads and writes of asynchronous copies, and atomics.
void check_async_read(const void* address, size_t bytes, Pc pc);
void check_async_write(const void* address, size_t bytes, Pc pc);
void check_atomic(const void* address, size_t bytes, Pc pc);

// Does this lie in the image's read-only data, where a kernel's constant tables are?
bool in_constants(const void* address, size_t bytes);

// Window address -> offset in the block's shared memory; reports what lies outside.
uint32_t shared_offset(uint32_t address, uint32_t bytes, const char* what, Pc pc);

}  // namespace simt
