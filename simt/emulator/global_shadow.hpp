// Global memory: who wrote and read each two bytes of the writable buffers during this launch.
//
// Blocks of one launch run in no order, so a word that one block writes plainly no other may touch, except after a
// message: block X fences and then does an atomic on some word, block Y does an atomic on that word and then fences.
// Atomics are free among themselves. What a block publishes is counted in its epochs; the fence of one thread speaks
// for its whole block, because barriers inside the block are the business of the vector clocks.
//
// Within a block the clocks of race.hpp say what is ordered. Of several threads that read a word only the last is
// remembered.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "race.hpp"
#include "sites.hpp"

namespace simt {

// Block (linear index) -> how many of its epochs are ordered before now.
using BlockEpochs = std::map<uint32_t, uint32_t>;

struct BlockClock {
  uint32_t epoch = 0;
  BlockEpochs acquired;
};

// A thread's half of the message: what its last fence published, and what its atomics have met since.
struct GlobalSync {
  BlockEpochs released, met;
};

// The launch's half: what the atomics on a word have published.
struct GlobalSyncTable {
  std::mutex mutex;
  std::map<const void*, BlockEpochs> words;
};

void fence(GlobalSync& thread, BlockClock& clock, uint32_t block);
void atomic_message(GlobalSync& thread, GlobalSyncTable& table, const void* word);

// Who accesses, and what is ordered before that: of other blocks, of threads of its own.
struct GlobalActor {
  uint32_t block;
  const Thread& thread;
  const BlockClock& blocks;
};

// An earlier access that nothing orders before this one; `against` is empty where all is well.
struct GlobalConflict {
  std::string against;
  bool same_block = false;
};

class GlobalShadow {
 public:
  explicit GlobalShadow(size_t bytes);
  GlobalConflict read(size_t offset, size_t bytes, const GlobalActor& actor, Pc pc);
  GlobalConflict write(size_t offset, size_t bytes, const GlobalActor& actor, Pc pc, bool atomic);

 private:
  struct Stamp {
    uint64_t block;   // block + 1, epoch, atomic, pc
    uint64_t thread;  // thread, clock of its warp
  };
  // The last access of a kind. Its two words can only belong to different accesses where blocks race, or do atomics,
  // and in neither case does the second word matter.
  struct Access {
    std::atomic<uint64_t> block{0}, thread{0};
    Stamp load() const;
    Stamp replace(const Stamp& by);
  };
  struct Cell {
    Access write, read;
  };
  static bool ordered(const Stamp& earlier, const GlobalActor& actor);
  static GlobalConflict conflict(const char* what, const Stamp& earlier, const GlobalActor& actor);
  std::unique_ptr<Cell[], void (*)(void*)> cells_;
};

}  // namespace simt
