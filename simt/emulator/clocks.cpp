#include "clocks.hpp"

#include <algorithm>

#include "state.hpp"

namespace simt {
namespace {

const Thread& lane_of(const Warp& warp, int lane) { return block->threads[warp.id * LANES + lane]; }

// All that the lanes of the warp know, and what they have done up to now.
void gather(Warp& warp, Knowledge& into) {
  into.learn(warp.clock.common);
  for (int lane = 0; lane < LANES; lane++) {
    Thread& thread = block->threads[warp.id * LANES + lane];
    into.learn(thread.knowledge);
    thread.knowledge.clear();
  }
  for (int lane = 0; lane < LANES; lane++) raise(into.seen, uint32_t(warp.id * LANES + lane), warp.clock.now);
  warp.clock.joined = ++warp.clock.now;
}

}  // namespace

void raise(Clock& clock, const Clock& by) {
  if (clock.size() < by.size()) clock.resize(by.size(), 0);
  for (size_t i = 0; i < by.size(); i++) clock[i] = std::max(clock[i], by[i]);
}

void raise(Clock& clock, uint32_t actor, uint32_t time) {
  if (clock.size() <= actor) clock.resize(actor + 1, 0);
  clock[actor] = std::max(clock[actor], time);
}

void Knowledge::learn(const Knowledge& other) {
  raise(seen, other.seen);
  raise(proxy, other.proxy);
}

void Knowledge::clear() {
  seen.clear();
  proxy.clear();
}

bool sees(const Thread& thread, uint32_t actor, uint32_t time) {
  return actor == thread.id || covers(thread.warp->clock.common.seen, actor, time) ||
         covers(thread.knowledge.seen, actor, time);
}

bool sees(const Warp& warp, uint32_t actor, uint32_t time) {
  if (covers(warp.clock.common.seen, actor, time)) return true;
  for (int lane = 0; lane < LANES; lane++)
    if (!covers(lane_of(warp, lane).knowledge.seen, actor, time)) return false;
  return true;
}

bool sees_in_proxy(const Thread& thread, uint32_t actor, uint32_t time) {
  return covers(thread.warp->clock.common.proxy, actor, time) || covers(thread.knowledge.proxy, actor, time);
}

bool sees_in_proxy(const Warp& warp, uint32_t actor, uint32_t time) {
  if (covers(warp.clock.common.proxy, actor, time)) return true;
  for (int lane = 0; lane < LANES; lane++)
    if (!covers(lane_of(warp, lane).knowledge.proxy, actor, time)) return false;
  return true;
}

void join(Warp* const* warps, size_t count) {
  Knowledge& all = warps[0]->clock.common;
  for (size_t i = 0; i < count; i++) gather(*warps[i], all);
  for (size_t i = 1; i < count; i++) warps[i]->clock.common = all;
}

void release(Thread& thread, Knowledge& message) {
  message.learn(thread.warp->clock.common);
  message.learn(thread.knowledge);
  raise(message.seen, thread.id, thread.warp->clock.now++);
}

void acquire(Thread& thread, const Knowledge& message) { thread.knowledge.learn(message); }

void publish_to_proxy(Thread& thread) {
  Clock& proxy = thread.knowledge.proxy;
  raise(proxy, thread.warp->clock.common.seen);
  raise(proxy, thread.knowledge.seen);
  raise(proxy, thread.id, thread.warp->clock.now++);
}

}  // namespace simt
