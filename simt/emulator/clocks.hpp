// What a thread knows to have happened before now: vector clocks.
//
// Time is counted per warp: `now` advances at each barrier it passes and at each release by one of its lanes. Whoever
// does something is an actor: the threads of the block, and behind them its mbarriers, in whose name bulk copies write.
//
// A warp knows together what barriers told it. What a single lane learnt alone, from an mbarrier or a proxy fence, it
// keeps to itself until the next barrier shares it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

struct Thread;
struct Warp;

// Per actor, up to which of its clocks everything is ordered before now. Actors beyond the end: nothing.
using Clock = std::vector<uint32_t>;

inline bool covers(const Clock& clock, uint32_t actor, uint32_t time) {
  return actor < clock.size() && clock[actor] >= time;
}
void raise(Clock& clock, const Clock& by);
void raise(Clock& clock, uint32_t actor, uint32_t time);

// `seen`: ordered before now. `proxy`: moreover made visible to the async proxy, by a fence.proxy.async in between
// ("Memory Consistency Model: proxies"); empty where the kernel has none.
struct Knowledge {
  Clock seen, proxy;
  void learn(const Knowledge& other);
  bool empty() const { return seen.empty() && proxy.empty(); }
  void clear();
};

struct WarpClock {
  uint32_t now = 1;
  uint32_t joined = 1;  // the value of `now` since the last barrier: reads older than this are ordered among the lanes
  Knowledge common;
};

// Is what `actor` did at `time` ordered before what this thread, or every lane of this warp, does now?
bool sees(const Thread& thread, uint32_t actor, uint32_t time);
bool sees(const Warp& warp, uint32_t actor, uint32_t time);
// And visible to the async proxy, in whose name the thread or the warp acts?
bool sees_in_proxy(const Thread& thread, uint32_t actor, uint32_t time);
bool sees_in_proxy(const Warp& warp, uint32_t actor, uint32_t time);

// A barrier among these warps: what any of their lanes knew or did before it, all of them know after it.
void join(Warp* const* warps, size_t count);

// One thread's half of a message: `release` adds all that it has done and knows, `acquire` learns.
void release(Thread& thread, Knowledge& message);
void acquire(Thread& thread, const Knowledge& message);

// fence.proxy.async: what the thread has done and knows becomes visible to the async proxy.
void publish_to_proxy(Thread& thread);

}  // namespace simt
