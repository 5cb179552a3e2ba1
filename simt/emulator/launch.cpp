#include "launch.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <thread>

#include "scheduler.hpp"

namespace simt {
namespace {

constexpr uint64_t MAX_BLOCKS = 0xfffffe;  // what the shadow of global memory can name
constexpr uint32_t MAX_THREADS = 1024;
constexpr uint32_t MAX_SHARED = 227 * 1024;  // the most any modelled architecture has for one block
constexpr uint32_t REGISTERS = 65536;  // of a multiprocessor
constexpr size_t SHARED_ALIGNMENT = 1024;

std::string refusal(const SimtLaunch& r) {
  const uint64_t threads = uint64_t(r.block[0]) * r.block[1] * r.block[2];
  if (threads == 0 || threads > MAX_THREADS || threads % LANES)
    return text("block of ", threads, " threads: must be a multiple of 32 up to 1024");
  if (r.grid[0] == 0 || r.grid[1] == 0 || r.grid[2] == 0) return "grid without blocks";
  if (r.grid[0] > 0x7fffffff || r.grid[1] > 65535 || r.grid[2] > 65535)
    return "grid larger than (2^31 - 1, 65535, 65535)";
  if (double(r.grid[0]) * r.grid[1] * r.grid[2] > double(MAX_BLOCKS))
    return "the emulator runs at most 2^24 - 2 blocks";
  if (r.shared_bytes > MAX_SHARED)
    return text(r.shared_bytes, " bytes of shared memory: at most ", MAX_SHARED);
  if (r.registers > 255 || r.registers * threads > REGISTERS)
    return text(r.registers, " registers for each of ", threads, " threads: at most 255, and 65536 in all");
  return "";
}

// Without word from the launch: as many as ptxas may take for one block per multiprocessor.
uint32_t registers_of(const SimtLaunch& r, uint32_t threads) {
  if (r.registers) return r.registers;
  return std::min<uint32_t>(REGISTERS / threads / 8 * 8, 248);
}

uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// What one OS thread needs to run blocks, allocated once and used for block after block.
class Worker {
 public:
  explicit Worker(Launch& launch) {
    const SimtLaunch& r = *launch.request;
    threads_ = size_t(r.block[0]) * r.block[1] * r.block[2];
    // One stack more than there are threads, below the first: an overflow there shall be reported, too.
    void* stacks = mmap(nullptr, mapped(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<char*>(stacks) + STACK_BYTES;
    shared_memory_.resize(r.shared_bytes + 2 * SHARED_MARGIN + SHARED_ALIGNMENT);
    block_.launch = &launch;
    block_.stacks = stacks_;
    block_.shared_bytes = r.shared_bytes;
    const auto margin = reinterpret_cast<uintptr_t>(shared_memory_.data()) + SHARED_MARGIN;
    block_.shared = reinterpret_cast<char*>((margin + SHARED_ALIGNMENT - 1) & ~uintptr_t(SHARED_ALIGNMENT - 1));
    block_.buffer_stats.resize(launch.regions.size());
  }
  ~Worker() { munmap(stacks_ - STACK_BYTES, mapped()); }
  Worker(const Worker&) = delete;

  Block& run(uint64_t linear) {
    prepare(linear);
    simt::block = &block_;
    run_block_threads();
    simt::block = nullptr;
    for (Warp& warp : block_.warps) warp.banks.close(block_.stats);
    return block_;
  }

 private:
  size_t mapped() const { return (threads_ + 1) * STACK_BYTES; }

  void prepare(uint64_t linear) {
    Block& b = block_;
    const SimtLaunch& r = *b.launch->request;
    const int warps = int(threads_ / LANES);
    b.linear = linear;
    b.x = uint32_t(linear % r.grid[0]);
    b.y = uint32_t(linear / r.grid[0] % r.grid[1]);
    b.z = uint32_t(linear / r.grid[0] / r.grid[1]);
    b.random.seed(mix(r.seed ^ mix(linear + 1)));
    b.ready = warps == 32 ? ALL_LANES : (1u << warps) - 1;
    b.alive = uint32_t(threads_);
    b.global_clock = {};
    b.last_region = 0;
    for (NamedBarrier& barrier : b.barriers) barrier.waiting.clear();
    b.mbarriers.clear();
    b.bulk_copies.clear();
    b.register_queue.clear();
    b.free_registers = REGISTERS - registers_of(r, uint32_t(threads_)) * uint32_t(threads_);
    if (b.launch->checked()) b.shadow.reset(b.shared_bytes, warps);
    poison(b.shared, b.shared_bytes);

    b.elected_lane = int(b.random() % LANES);
    b.warps.assign(warps, Warp());
    for (int w = 0; w < warps; w++) {
      Warp& warp = b.warps[w];
      warp.id = w;
      warp.registers = registers_of(r, uint32_t(threads_));
      warp.runnable = warp.live = ALL_LANES;
      warp.first_lane = int(b.random() % LANES);
      warp.clock.common.seen.assign(threads_, 0);
    }
    b.threads.resize(threads_);
    for (uint32_t t = 0; t < threads_; t++) {
      Thread& thread = b.threads[t];
      thread.exited = false;
      thread.waits_for = nullptr;
      thread.copies.clear();
      thread.groups.clear();
      thread.uncommitted = 0;
      thread.bulk_stores = {};
      thread.sync = {};
      thread.knowledge.clear();
      thread.guarded.clear();
      thread.warp = &b.warps[t / LANES];
      thread.id = uint16_t(t);
      thread.lane = uint8_t(t % LANES);
      thread.x = t % r.block[0];
      thread.y = t / r.block[0] % r.block[1];
      thread.z = t / r.block[0] / r.block[1];
      thread.stack = stacks_ + size_t(t) * STACK_BYTES;
    }
  }

  size_t threads_;
  char* stacks_;
  std::vector<char> shared_memory_;
  Block block_;
};

void add(SimtStats& into, const SimtStats& from) {
  // All counters, and nothing but counters.
  auto* to = reinterpret_cast<uint64_t*>(&into);
  auto* of = reinterpret_cast<const uint64_t*>(&from);
  for (size_t i = 0; i < sizeof(SimtStats) / sizeof(uint64_t); i++) to[i] += of[i];
}

void collect(Outcome& outcome, const Block& b) {
  add(outcome.stats, b.stats);
  for (size_t i = 0; i < outcome.buffers.size(); i++) {
    const SimtBufferStats& from = b.buffer_stats[i + 1];  // behind the parameter block
    SimtBufferStats& to = outcome.buffers[i];
    to.read += from.read;
    to.read_async += from.read_async;
    to.written += from.written;
    to.atomic += from.atomic;
  }
  for (const SyncSite& site : b.sites) {
    auto is_same = [&](const SyncSite& s) { return s.pc == site.pc; };
    auto same = std::find_if(outcome.sites.begin(), outcome.sites.end(), is_same);
    if (same == outcome.sites.end()) outcome.sites.push_back(site);
    else same->executed += site.executed;
  }
}

// Block numbers in an order that depends on the seed: a stride that shares no factor with the count visits each once.
struct Order {
  uint64_t count, stride, start;
  Order(uint64_t blocks, uint64_t seed) : count(blocks), stride(1), start(mix(seed) % blocks) {
    auto shares_factor = [](uint64_t a, uint64_t b) {
      while (b) std::swap(a %= b, b);
      return a != 1;
    };
    if (blocks <= 2) return;
    stride = 1 + mix(seed + 1) % (blocks - 1);
    while (shares_factor(stride, blocks)) stride = stride % (blocks - 1) + 1;
  }
  uint64_t operator()(uint64_t i) const { return (start + i * stride) % count; }
};

}  // namespace

Outcome run(const SimtLaunch& request) {
  Outcome outcome;
  outcome.buffers.resize(request.buffer_count);
  if (std::string why = refusal(request); !why.empty()) {
    outcome.fault = {SIMT_BAD_LAUNCH, why};
    return outcome;
  }
  Launch launch;
  launch.request = &request;
  auto* params = static_cast<char*>(const_cast<void*>(request.params));
  launch.regions.push_back({params, params + request.params_bytes, false, "kernel parameters", nullptr});
  std::vector<std::unique_ptr<GlobalShadow>> shadows;
  for (size_t i = 0; i < request.buffer_count; i++) {
    const SimtBuffer& buffer = request.buffers[i];
    auto* begin = static_cast<char*>(buffer.data);
    if (buffer.writable && request.checks) shadows.push_back(std::make_unique<GlobalShadow>(buffer.bytes));
    launch.regions.push_back({begin, begin + buffer.bytes, buffer.writable != 0, buffer.name,
                              buffer.writable && request.checks ? shadows.back().get() : nullptr});
  }

  const Order order(uint64_t(request.grid[0]) * request.grid[1] * request.grid[2], request.seed);
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  auto work = [&] {
    Worker worker(launch);
    const Block* last = nullptr;
    for (uint64_t i; !launch.stop && (i = next++) < order.count;) {
      const Block& b = worker.run(order(i));
      last = &b;
      if (b.fault.kind == SIMT_NO_FAULT) continue;
      launch.stop = true;
      std::lock_guard<std::mutex> lock(mutex);
      if (outcome.fault.kind == SIMT_NO_FAULT) outcome.fault = b.fault;
    }
    std::lock_guard<std::mutex> lock(mutex);
    if (last) collect(outcome, *last);
  };
  std::vector<std::thread> others;
  for (uint64_t w = 1; w < std::min<uint64_t>(request.workers, order.count); w++) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  outcome.fault.message = symbolise(outcome.fault.message);
  return outcome;
}

}  // namespace simt
