// setmaxnreg: the block's pool of registers ("Miscellaneous Instructions: setmaxnreg"). The pool holds what the launch
// left of the 65536 registers of a multiprocessor; an increase waits until other warps have given back enough.
#include "../../kernels/ptx/contract.h"
#include "scheduler.hpp"

namespace simt {
namespace {

struct Nothing {};

void check_count(uint32_t count, Pc pc) {
  if (count < 24 || count > 256 || count % 8)
    fail(SIMT_REGISTERS, "setmaxnreg of ", count, ": must be a multiple of 8 from 24 to 256 (", at(pc), ")");
}

}  // namespace

void setmaxnreg_dec(uint32_t count) {
  const Pc pc = SIMT_CALLER;
  check_count(count, pc);
  Nothing mine;
  collective(Op::SetmaxnregDec, pc, mine, [&](Warp& warp, auto&) {
    if (count > warp.registers)
      fail(SIMT_REGISTERS, "setmaxnreg.dec to ", count, " of a warp that has ", warp.registers, " (", at(pc), ")");
    block->free_registers += (warp.registers - count) * LANES;
    warp.registers = count;
    for (Thread* waiting : block->register_queue) wake_lane(*waiting);
    block->register_queue.clear();
  });
}

void setmaxnreg_inc(uint32_t count) {
  const Pc pc = SIMT_CALLER;
  check_count(count, pc);
  Nothing mine;
  if (!arrive(Op::SetmaxnregInc, pc, &mine)) return;
  Warp& warp = *self->warp;
  if (count < warp.registers)
    fail(SIMT_REGISTERS, "setmaxnreg.inc to ", count, " of a warp that has ", warp.registers, " (", at(pc), ")");
  const uint32_t needed = (count - warp.registers) * LANES;
  // The last lane waits for the whole warp; the others stay at the rendezvous until `finish`. Woken, it looks again:
  // another warp may have been quicker.
  while (block->free_registers < needed) {
    block->register_queue.push_back(self);
    block_self("setmaxnreg.inc", pc);
  }
  block->free_registers -= needed;
  warp.registers = count;
  finish(warp);
}

}  // namespace simt
