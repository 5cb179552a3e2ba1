#include "state.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace driver {
namespace {

std::string variable(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}

}  // namespace

// SIMT_DRIVER_DEVICES lists architectures, SIMT_DRIVER_VERSION is 13000 for CUDA 13.0, SIMT_DRIVER_SEED decides the order
// of streams, SIMT_DRIVER_FAIL=N:CODE has the N-th call fail.
Driver::Driver() {
  std::stringstream list(variable("SIMT_DRIVER_DEVICES", "sm_80"));
  for (std::string name; std::getline(list, name, ',');) {
    if (name.rfind("sm_", 0) != 0 || atoi(name.c_str() + 3) < 10) {
      fprintf(stderr, "stand-in driver: SIMT_DRIVER_DEVICES has `%s`; list architectures as sm_80\n", name.c_str());
      abort();
    }
    devices.push_back({atoi(name.c_str() + 3)});
  }
  version = atoi(variable("SIMT_DRIVER_VERSION", "13000").c_str());
  random.seed(strtoull(variable("SIMT_DRIVER_SEED", "1").c_str(), nullptr, 10));
  unsigned long long n = 0;
  unsigned code = 0;
  if (sscanf(variable("SIMT_DRIVER_FAIL", "").c_str(), "%llu:%u", &n, &code) == 2) {
    fail_call = n;
    call_code = Code(code);
  }
}

Driver& state() {
  // Never destroyed: other libraries' destructors may still call.
  static Driver& driver = *new Driver();
  return driver;
}

Call::Call(const char* name, bool needs_init) : lock_(state().mutex) {
  Driver& d = state();
  d.calls.push_back(name);
  if (d.fail_call && --d.fail_call == 0) refused = d.call_code;
  else if (needs_init && !d.initialized) refused = NOT_INITIALIZED;
}

uint32_t Device::shared_optin() const {
  switch (capability) {
    case 80: return 163 << 10;
    case 90: case 100: case 103: return 227 << 10;
    default: return 99 << 10;
  }
}

int Device::attribute(int attribute, bool& known) const {
  known = true;
  switch (attribute) {
    case MAX_THREADS_PER_BLOCK: return 1024;
    case MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
    case WARP_SIZE: return 32;
    case MAX_REGISTERS_PER_BLOCK: return 65536;
    case MULTIPROCESSOR_COUNT: return 2;
    case UNIFIED_ADDRESSING: return 1;
    case COMPUTE_CAPABILITY_MAJOR: return capability / 10;
    case COMPUTE_CAPABILITY_MINOR: return capability % 10;
    case MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return int(shared_optin()) + 1024;
    case MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return int(shared_optin());
    case MEMORY_POOLS_SUPPORTED: return 1;
  }
  known = false;
  return 0;
}

const char* name_of(uint32_t code) {
#define NAME(name) case name: return "CUDA_ERROR_" #name
  switch (code) {
    case SUCCESS: return "CUDA_SUCCESS";
    NAME(INVALID_VALUE);
    NAME(OUT_OF_MEMORY);
    NAME(NOT_INITIALIZED);
    NAME(NO_DEVICE);
    NAME(INVALID_DEVICE);
    NAME(INVALID_IMAGE);
    NAME(INVALID_CONTEXT);
    NAME(NO_BINARY_FOR_GPU);
    NAME(INVALID_PTX);
    NAME(UNSUPPORTED_PTX_VERSION);
    NAME(INVALID_HANDLE);
    NAME(ILLEGAL_STATE);
    NAME(NOT_FOUND);
    NAME(NOT_READY);
    NAME(ILLEGAL_ADDRESS);
    NAME(CONTEXT_IS_DESTROYED);
    NAME(LAUNCH_FAILED);
    NAME(NOT_SUPPORTED);
    NAME(STREAM_CAPTURE_UNSUPPORTED);
    NAME(STREAM_CAPTURE_INVALIDATED);
    NAME(STREAM_CAPTURE_UNMATCHED);
    NAME(STREAM_CAPTURE_UNJOINED);
    NAME(STREAM_CAPTURE_ISOLATION);
    NAME(STREAM_CAPTURE_IMPLICIT);
    NAME(CAPTURED_EVENT);
    NAME(STREAM_CAPTURE_WRONG_THREAD);
  }
#undef NAME
  return nullptr;
}

}  // namespace driver
