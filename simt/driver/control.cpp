// What a test sees of the stand-in driver and does to it.
#include <sstream>

#include "exports.hpp"
#include "state.hpp"

using namespace driver;

namespace {

// Answers with a text that lives until the next time.
template <class F>
const char* answer(std::string& kept, F write) {
  Driver& d = state();
  std::lock_guard<std::mutex> lock(d.mutex);
  std::ostringstream text;
  write(d, text);
  kept = text.str();
  return kept.c_str();
}

}  // namespace

const char* simt_driver_calls() {
  static std::string kept;
  return answer(kept, [](Driver& d, std::ostream& text) {
    for (const std::string& name : d.calls) text << name << '\n';
  });
}

void simt_driver_forget_calls() {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().calls.clear();
}

void simt_driver_fail_call(uint64_t n, uint32_t code) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().fail_call = n;
  state().call_code = Code(code);
}

void simt_driver_fail_execution(uint64_t n, uint32_t code) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().fail_execution = n;
  state().execution_code = Code(code);
}

const char* simt_driver_live() {
  static std::string kept;
  return answer(kept, [](Driver& d, std::ostream& text) {
    size_t streams = 0, allocations = 0, retained = 0;
    for (const Context* context : d.contexts) {
      streams += context->streams.size();
      retained += size_t(context->retained);
    }
    for (auto& [base, allocation] : d.memory) allocations += !allocation.freed;
    text << "contexts " << d.contexts.size() << "\nretained " << retained << "\nstreams " << streams << "\nevents "
         << d.events.size() << "\nallocations " << allocations << "\npinned " << d.pinned.size() << "\nlibraries "
         << d.libraries.size() << "\ngraphs " << d.graphs.size() << "\nexecs " << d.execs.size() << "\ncaptures "
         << d.captures.size() << '\n';
  });
}

const char* simt_driver_fault() {
  static std::string kept;
  return answer(kept, [](Driver& d, std::ostream& text) { text << d.fault; });
}

const char* simt_driver_launches() {
  static std::string kept;
  return answer(kept, [](Driver& d, std::ostream& text) {
    for (const LaunchRecord& launch : d.launches)
      text << launch.kernel << ' ' << launch.grid[0] << ' ' << launch.block[0] << ' ' << launch.shared_bytes << '\n';
  });
}
