// A fiber is one thread of a block: a stack of its own and a place to come back to. Switching is symmetric. x86-64 and
// aarch64 switch by hand in about ten instructions (10 ns); anything else goes through ucontext (two system calls, 350
// ns).
#pragma once
#include <cstddef>

// Defining SIMT_FIBER_UCONTEXT (CXXFLAGS) chooses the fallback anywhere.
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(SIMT_FIBER_UCONTEXT)
#define SIMT_FIBER_UCONTEXT
#endif
#if defined(SIMT_FIBER_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
#if defined(SIMT_FIBER_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// Makes `fiber` start in `entry` at the next switch to it. `entry` must never return.
void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)());

// Saves the running fiber in `from` and continues `to`. Both live on the same OS thread: thread-local addresses may be
// held in registers across the switch.
void fiber_switch(Fiber& from, Fiber& to);

}  // namespace simt
