// All that the stand-in driver knows: devices, contexts, streams, memory, images. One mutex guards it; a call of the
// driver holds it from its first line to its last.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "abi.hpp"
#include "simt/registry.hpp"

namespace driver {

// A moment in a stream: true once it has passed.
using Marker = std::shared_ptr<bool>;

struct Context;
struct Capture;

struct Operation {
  std::function<Code()> work;
  std::vector<Marker> waits;  // moments of other streams that must have passed before
  Marker done;
};

struct Stream {
  Context* context;
  bool blocking;                 // waits for the null stream, and the null stream for it
  std::deque<Operation> queue;   // not yet executed
  Marker last;                   // when everything so far is done; null if nothing ever was
  Capture* capture = nullptr;
  bool joined = true;            // of a captured stream: the capture's origin waits for all of it
};

struct Context {
  int device;
  bool primary;
  int retained = 0;
  Code sticky = SUCCESS;  // an error of the device: every later call returns it
  Stream null_stream;
  std::map<std::thread::id, std::unique_ptr<Stream>> per_thread;
  std::set<Stream*> streams;  // created, and those destroyed with work left to do
};

struct Event {
  Context* context;
  Marker recorded;
  Capture* capture = nullptr;  // it was last recorded in
  Stream* captured_stream = nullptr;
  double at = 0;               // count of operations executed, in place of time
};

struct Allocation {
  Context* context;
  size_t bytes;
  int number;
  bool freed = false;
};

// One machine code or PTX image with the names of its kernels.
struct Image {
  bool ptx;
  std::string text;  // of PTX
  int architecture;  // 80 for sm_80
  std::vector<std::string> names;

  bool loads_on(int capability) const {
    return ptx ? architecture <= capability
               : architecture / 10 == capability / 10 && architecture <= capability;
  }
};

struct Library {
  Image image;
  Context* context;  // of a module; a library belongs to none
};

// A CUfunction of a module, or a CUkernel of a library.
struct Function {
  Library* library;
  std::string name;
  const SimtRegisteredKernel* kernel;          // null where PTX is interpreted
  std::shared_ptr<const void> program;         // of PTX
  size_t params_bytes;
  std::map<int, int> dynamic_shared;  // the most allowed, by device
};

struct Capture {
  Stream* origin;
  CaptureMode mode;
  std::thread::id thread;
  bool invalid = false;
  std::set<Stream*> streams;
  std::vector<std::function<Code()>> nodes;
};

// A graph, and what is instantiated from it: the operations, in the order in which they were captured.
struct Graph {
  std::vector<std::function<Code()>> nodes;
};
struct GraphExec {
  Context* context;
  std::vector<std::function<Code()>> nodes;
};

struct Device {
  int capability;  // 80 for sm_80
  Context* primary = nullptr;

  int attribute(int attribute, bool& known) const;
  uint32_t shared_optin() const;
};

struct LaunchRecord {
  std::string kernel;
  uint32_t grid[3], block[3], shared_bytes;
};

struct Driver {
  std::mutex mutex;
  std::mt19937_64 random;
  int version;
  bool initialized = false;
  std::vector<Device> devices;

  std::set<Context*> contexts;
  std::set<Event*> events;
  std::set<Library*> libraries;
  std::set<Function*> functions;
  std::set<Graph*> graphs;
  std::set<GraphExec*> execs;
  std::set<Capture*> captures;
  std::map<uintptr_t, Allocation> memory;  // of devices; freed places are kept, so that none is given out twice
  std::map<uintptr_t, size_t> pinned;      // of the host
  int allocations = 0;
  double executed = 0;

  // Observation and injected faults (control.cpp).
  std::vector<std::string> calls;
  uint64_t fail_call = 0, fail_execution = 0;  // counted down; 0: none
  Code call_code = SUCCESS, execution_code = SUCCESS;
  std::string fault;
  std::vector<LaunchRecord> launches;

  Driver();
};

Driver& state();

// One call of the driver: takes the mutex, notes the name, and refuses where it must.
class Call {
 public:
  explicit Call(const char* name, bool needs_init = true);
  Code refused = SUCCESS;

 private:
  std::unique_lock<std::mutex> lock_;
};
#define CALL(name)  \
  Call call(#name); \
  if (call.refused) return call.refused

// Contexts (contexts.cpp).
extern thread_local std::vector<Context*> current_stack;
Context* current();             // null if the thread has none, or a destroyed one
Code usable(const Context* context);  // SUCCESS, INVALID_CONTEXT or the sticky error

// Streams (streams.cpp). `resolve` finds the stream behind a handle, of the current context for those that name none.
Code resolve(void* handle, Stream*& stream);
Code enqueue(Stream& stream, std::function<Code()> work, std::vector<Marker> waits = {});
bool step();                        // executes one operation of some stream, if any can be executed
void run_until(const Marker& marker);
void drain(Stream& stream);
void drain(Context& context);
// What is forbidden while a stream is captured, unless this thread relaxed the rule.
Code forbidden_in_capture();
Code forbidden_on(const Stream& stream);  // synchronising or asking a stream that is being captured
extern thread_local CaptureMode thread_capture_mode;

// Memory (memory.cpp).
Allocation* find(uintptr_t address, size_t bytes, uintptr_t* base = nullptr);  // live, and all of it inside
std::string describe(uintptr_t address);

// Images (images.cpp).
Code parse(const void* data, int driver_version, Image& image);

}  // namespace driver
