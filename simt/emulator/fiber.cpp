// The three ways of switching stacks. Only callee-saved registers are kept: for the compiler the switch is a function
// call.
#include "fiber.hpp"

#include <cstdint>

#if defined(SIMT_FIBER_UCONTEXT)

namespace simt {

void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void fiber_switch(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

}  // namespace simt

#else

// The asm label keeps the name free of the leading underscore of Mach-O.
extern "C" void simt_fiber_switch(void** save_stack_pointer, void* stack_pointer) asm("simt_fiber_switch");

#if defined(__x86_64__)

asm(R"(
.text
.globl simt_fiber_switch
.p2align 4
simt_fiber_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace simt {

void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15);
  auto* slot = reinterpret_cast<uintptr_t*>(top);
  *--slot = 0;  // the return address of `entry`, which has none; leaves rsp where a call would: 8 mod 16
  *--slot = reinterpret_cast<uintptr_t>(entry);  // popped by the switch's ret
  for (int saved = 0; saved < 6; saved++) *--slot = 0;
  fiber.stack_pointer = slot;
}

}  // namespace simt

#elif defined(__aarch64__)

asm(R"(
.text
.globl simt_fiber_switch
.p2align 4
simt_fiber_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");

namespace simt {

void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15);
  auto* frame = reinterpret_cast<uintptr_t*>(top - 160);
  for (int slot = 0; slot < 20; slot++) frame[slot] = 0;
  frame[11] = reinterpret_cast<uintptr_t>(entry);  // x30, where the switch's ret goes
  fiber.stack_pointer = frame;
}

}  // namespace simt

#endif

namespace simt {

void fiber_switch(Fiber& from, Fiber& to) { simt_fiber_switch(&from.stack_pointer, to.stack_pointer); }

}  // namespace simt

#endif
