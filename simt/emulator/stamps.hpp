// How the shadow of shared memory packs an access into one word.
#pragma once
#include <cstdint>

#include "race.hpp"

namespace simt {

// Who read, beside the lane numbers 0..31.
constexpr int WHOLE_WARP = 32;     // a warp-wide instruction
constexpr int SEVERAL_LANES = 33;  // more than one lane since the warp's last barrier

inline uint64_t write_key(CellState state, uint32_t thread, uint32_t clock) {
  return uint64_t(clock) << 32 | thread << 8 | uint64_t(state);
}
inline CellState state_of(uint64_t key) { return CellState(key & 0xff); }
inline uint32_t actor_of(uint64_t key) { return key >> 8 & 0xffffff; }
inline uint32_t clock_of(uint64_t key) { return key >> 32; }

// 26 bits of clock: 67 million barriers and releases of one block.
inline uint64_t read_stamp(uint32_t clock, int lane, Pc pc) {
  return uint64_t(clock) << 38 | uint64_t(lane) << 32 | pc;
}
inline uint32_t read_clock(uint64_t stamp) { return stamp >> 38; }
inline int read_lane(uint64_t stamp) { return int(stamp >> 32 & 63); }
inline Pc read_pc(uint64_t stamp) { return Pc(stamp); }

}  // namespace simt
