#include "global_shadow.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "state.hpp"

namespace simt {
namespace {

constexpr size_t CELL_BYTES_GLOBAL = 2;
constexpr uint32_t LAST_EPOCH = 127;           // a block that publishes more often is checked less closely from then on
constexpr uint32_t SEVERAL_BLOCKS = 0xffffff;  // as a reader; also one more than the largest block index that fits

uint64_t stamp(uint32_t block_plus_one, uint32_t epoch, bool atomic, Pc pc) {
  return uint64_t(block_plus_one) << 40 | uint64_t(std::min(epoch, LAST_EPOCH)) << 33 | uint64_t(atomic) << 32 | pc;
}
uint32_t block_of(uint64_t s) { return uint32_t(s >> 40); }
uint32_t epoch_of(uint64_t s) { return s >> 33 & 127; }
bool is_atomic(uint64_t s) { return s >> 32 & 1; }
Pc pc_of_stamp(uint64_t s) { return Pc(s); }

void learn(BlockEpochs& into, const BlockEpochs& from) {
  for (auto [block, epochs] : from) into[block] = std::max(into[block], epochs);
}

}  // namespace

void fence(GlobalSync& thread, BlockClock& clock, uint32_t block) {
  learn(clock.acquired, thread.met);
  thread.met.clear();
  clock.epoch++;
  thread.released = clock.acquired;
  thread.released[block] = clock.epoch;
}

void atomic_message(GlobalSync& thread, GlobalSyncTable& table, const void* word) {
  std::lock_guard<std::mutex> lock(table.mutex);
  BlockEpochs& published = table.words[word];
  learn(thread.met, published);
  learn(published, thread.released);
}

// calloc: untouched pages of a large buffer's shadow cost nothing.
GlobalShadow::GlobalShadow(size_t bytes)
    : cells_(static_cast<Cell*>(calloc(bytes / CELL_BYTES_GLOBAL + 1, sizeof(Cell))), &free) {
  if (!cells_) throw std::bad_alloc();
}

GlobalShadow::Stamp GlobalShadow::Access::load() const {
  return {block.load(), thread.load(std::memory_order_relaxed)};
}

GlobalShadow::Stamp GlobalShadow::Access::replace(const Stamp& by) {
  const uint64_t before = thread.load(std::memory_order_relaxed);
  thread.store(by.thread, std::memory_order_relaxed);
  return {block.exchange(by.block), before};
}

bool GlobalShadow::ordered(const Stamp& earlier, const GlobalActor& actor) {
  if (earlier.block == 0) return true;
  if (block_of(earlier.block) == actor.block + 1) {
    const uint32_t thread = uint32_t(earlier.thread >> 32), clock = uint32_t(earlier.thread);
    if (sees(actor.thread, thread, clock)) return true;
  }
  auto known = actor.blocks.acquired.find(block_of(earlier.block) - 1);
  return known != actor.blocks.acquired.end() && known->second > epoch_of(earlier.block);
}

GlobalConflict GlobalShadow::conflict(const char* what, const Stamp& earlier, const GlobalActor& actor) {
  const bool same_block = block_of(earlier.block) == actor.block + 1;
  std::string who = text("block #", block_of(earlier.block) - 1);
  if (block_of(earlier.block) == SEVERAL_BLOCKS) who = "several blocks";
  if (same_block) who = actor_name(uint32_t(earlier.thread >> 32));
  const char* atomic = is_atomic(earlier.block) ? "atomic " : "";
  return {text("the ", atomic, what, " by ", who, " (", at(pc_of_stamp(earlier.block)), ")"), same_block};
}

// Blocks on two OS threads may meet at one cell: each leaves its own stamp before it looks at the other's, so that at
// least one of them sees both.
GlobalConflict GlobalShadow::read(size_t offset, size_t bytes, const GlobalActor& actor, Pc pc) {
  const uint64_t thread = uint64_t(actor.thread.id) << 32 | actor.thread.warp->clock.now;
  for (size_t c = offset / CELL_BYTES_GLOBAL; c <= (offset + bytes - 1) / CELL_BYTES_GLOBAL; c++) {
    Cell& cell = cells_[c];
    const uint64_t before = cell.read.load().block;
    const bool alone = before == 0 || block_of(before) == actor.block + 1;
    cell.read.replace({stamp(alone ? actor.block + 1 : SEVERAL_BLOCKS, actor.blocks.epoch, false, pc), thread});
    const Stamp written = cell.write.load();
    if (!ordered(written, actor)) return conflict("write", written, actor);
  }
  return {};
}

GlobalConflict GlobalShadow::write(size_t offset, size_t bytes, const GlobalActor& actor, Pc pc, bool atomic) {
  const uint64_t thread = uint64_t(actor.thread.id) << 32 | actor.thread.warp->clock.now;
  const Stamp mine{stamp(actor.block + 1, actor.blocks.epoch, atomic, pc), thread};
  for (size_t c = offset / CELL_BYTES_GLOBAL; c <= (offset + bytes - 1) / CELL_BYTES_GLOBAL; c++) {
    Cell& cell = cells_[c];
    const Stamp written = cell.write.replace(mine);
    const bool among_atomics = atomic && is_atomic(written.block);
    if (!among_atomics && !ordered(written, actor)) return conflict("write", written, actor);
    const Stamp read = cell.read.load();
    if (!ordered(read, actor)) return conflict("read", read, actor);
  }
  return {};
}

}  // namespace simt
