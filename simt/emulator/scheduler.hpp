// Who runs next, and how the 32 lanes of a warp meet at an instruction that they execute as one.
#pragma once
#include "state.hpp"

namespace simt {

// Runs the current block's threads until all have exited or one has failed.
void run_block_threads();

// Stops the running lane until `wake` is called for it. `what` and `pc` go into the deadlock report.
void block_self(const char* what, Pc pc);
void wake(Warp& warp);
void wake_lane(Thread& thread);  // one lane that waits alone

// May hand over to another warp. Called wherever the hardware could as well.
void yield_sometimes();
void yield_to_any();

// The running lane has arrived at `op`. Returns true in the last of the 32 to arrive, which then executes the
// instruction for all of them and calls `finish`; in the others returns false, after it was executed.
bool arrive(Op op, Pc pc, void* arguments);
void finish(Warp& warp);

// A warp-wide instruction. `execute` gets the warp and the arguments of its 32 lanes; each lane's results go back
// through them.
template <class Arguments, class Execute>
void collective(Op op, Pc pc, Arguments& arguments, Execute execute) {
  if (!arrive(op, pc, &arguments)) return;
  Warp& warp = *self->warp;
  execute(warp, reinterpret_cast<Arguments* const(&)[LANES]>(warp.arguments));
  finish(warp);
}

// Notes that the synchronisation at `pc` was executed; true if this launch turns it into a no-op.
bool dropped(const char* what, Pc pc);

}  // namespace simt
