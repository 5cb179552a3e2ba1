#include "banks.hpp"

#include <algorithm>

namespace simt {
namespace {

constexpr uint32_t BANKS = 32, BANK_BYTES = 4;
// How far ahead a lane looks for its group. Bounds the cost where lanes take entirely different ways.
constexpr size_t LOOK_AHEAD = 256;

}  // namespace

namespace {

// The usual case, quickly: whole words, and no bank wanted twice.
bool all_banks_differ(const uint32_t* addresses, int lanes, uint32_t bytes_per_lane) {
  uint64_t taken = 0;
  for (int lane = 0; lane < lanes; lane++) {
    const uint64_t wanted = ((uint64_t(1) << bytes_per_lane / BANK_BYTES) - 1) << addresses[lane] / BANK_BYTES % BANKS;
    if (taken & wanted) return false;
    taken |= wanted;
  }
  return bytes_per_lane >= BANK_BYTES && taken <= 0xffffffff;  // beyond: an unaligned access that wraps around
}

}  // namespace

int bank_conflicts(const uint32_t* addresses, int lanes, uint32_t bytes_per_lane) {
  if (all_banks_differ(addresses, lanes, bytes_per_lane)) return 0;
  uint32_t words[BANKS][32];
  int counts[BANKS] = {};
  int most = 1;
  for (int lane = 0; lane < lanes; lane++) {
    for (uint32_t byte = 0; byte < bytes_per_lane; byte += BANK_BYTES) {
      const uint32_t word = (addresses[lane] + byte) / BANK_BYTES, bank = word % BANKS;
      if (std::find(words[bank], words[bank] + counts[bank], word) != words[bank] + counts[bank]) continue;
      words[bank][counts[bank]++] = word;
      most = std::max(most, counts[bank]);
    }
  }
  return most - 1;
}

void BankWindow::add(Kind kind, int lane, Pc pc, uint32_t offset, uint32_t bytes) {
  const uint32_t bit = 1u << lane;
  const size_t end = std::min(groups_.size(), next_[lane] + LOOK_AHEAD);
  for (size_t g = next_[lane]; g < end; g++) {
    Group& group = groups_[g];
    if (group.pc != pc || group.kind != kind || group.bytes != bytes || (group.lanes & bit)) continue;
    group.lanes |= bit;
    group.offsets[lane] = offset;
    next_[lane] = uint32_t(g + 1);
    return;
  }
  Group group{pc, kind, bytes, bit, {}};
  group.offsets[lane] = offset;
  groups_.push_back(group);
  next_[lane] = uint32_t(groups_.size());
}

void BankWindow::close(SimtStats& stats) {
  for (const Group& group : groups_) {
    // 128 bytes a phase: all lanes at up to 4 bytes each, half of them at 8, a quarter at 16.
    const int per_phase = group.bytes <= 4 ? 32 : group.bytes <= 8 ? 16 : 8;
    for (int first = 0; first < 32; first += per_phase) {
      uint32_t offsets[32];
      int lanes = 0;
      for (int lane = first; lane < first + per_phase; lane++)
        if (group.lanes >> lane & 1) offsets[lanes++] = group.offsets[lane];
      if (!lanes) continue;
      const bool plain = group.kind == Kind::Plain;
      (plain ? stats.shared_phases : stats.cp_async_phases)++;
      (plain ? stats.shared_conflicts : stats.cp_async_conflicts) += bank_conflicts(offsets, lanes, group.bytes);
    }
  }
  groups_.clear();
  std::fill(next_, next_ + 32, 0);
}

}  // namespace simt
