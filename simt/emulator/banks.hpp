// Shared-memory bank conflicts: 32 banks of 4 bytes; one access phase serves each bank once, all lanes that want the
// same word included.
//
// ldmatrix is exact: one phase per 8x8 matrix. Plain loads, stores and cp.async arrive lane by lane, because lanes run
// one after the other between two warp-wide instructions; the window pairs them up again: a lane's access joins the
// first group, after the one it joined last, that has the same call site and kind and lacks this lane. Right for
// converged code and for ordinary loops and branches; an approximation where lanes reach one site along different
// paths.
#pragma once
#include <cstdint>
#include <vector>

#include "c_abi.h"
#include "sites.hpp"

namespace simt {

// Extra passes that one phase needs: the largest number of distinct words wanted from one bank, less one.
int bank_conflicts(const uint32_t* addresses, int lanes, uint32_t bytes_per_lane);

class BankWindow {
 public:
  enum class Kind : uint8_t { Plain, CpAsync };
  void add(Kind kind, int lane, Pc pc, uint32_t offset, uint32_t bytes);
  // Counts the groups collected so far; called where the lanes of the warp meet.
  void close(SimtStats& stats);

 private:
  struct Group {
    Pc pc;
    Kind kind;
    uint32_t bytes;
    uint32_t lanes;
    uint32_t offsets[32];
  };
  std::vector<Group> groups_;
  uint32_t next_[32] = {};  // per lane: behind the group it joined last
};

}  // namespace simt
