// A ring of stages in shared memory, filled by one warp and emptied by others. Two mbarriers a stage: `full`, when its bytes have
// landed, and `empty`, when its readers are done.
#pragma once
#include "device.cuh"

// Until the phase of this parity has completed. The hardware may give up waiting.
DEVICE void wait_for_phase(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// A place in the ring. Its phases are counted from 0: parity 0, 1, 0, …
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  DEVICE void advance() {
    stage++;
    if (stage == STAGES) stage = 0, parity ^= 1;
  }
};
