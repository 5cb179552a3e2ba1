// Devices and contexts.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "exports.hpp"
#include "state.hpp"

namespace driver {

thread_local std::vector<Context*> current_stack;

Context* current() {
  if (current_stack.empty()) return nullptr;
  Context* context = current_stack.back();
  return state().contexts.count(context) ? context : nullptr;
}

Code usable(const Context* context) { return context ? context->sticky : INVALID_CONTEXT; }

namespace {

Device* device_of(int device) {
  std::vector<Device>& devices = state().devices;
  return device >= 0 && size_t(device) < devices.size() ? &devices[device] : nullptr;
}

Context* create(int device, bool primary) {
  auto* context = new Context{device, primary, 0, SUCCESS, {}, {}, {}};
  context->null_stream.context = context;
  context->null_stream.blocking = true;
  state().contexts.insert(context);
  return context;
}

// What lived in it goes with it.
void destroy(Context* context) {
  Driver& d = state();
  drain(*context);
  for (auto& [address, allocation] : d.memory)
    if (allocation.context == context) allocation.freed = true;
  d.contexts.erase(context);
  for (Device& device : d.devices)
    if (device.primary == context) device.primary = nullptr;
}

}  // namespace
}  // namespace driver

using namespace driver;

Code cuInit(unsigned flags) {
  Call call("cuInit", false);
  if (call.refused) return call.refused;
  if (flags) return INVALID_VALUE;
  if (state().devices.empty()) return NO_DEVICE;
  state().initialized = true;
  return SUCCESS;
}

Code cuDriverGetVersion(int* version) {
  Call call("cuDriverGetVersion", false);
  if (call.refused) return call.refused;
  if (!version) return INVALID_VALUE;
  *version = state().version;
  return SUCCESS;
}

Code cuDeviceGetCount(int* count) {
  CALL(cuDeviceGetCount);
  if (!count) return INVALID_VALUE;
  *count = int(state().devices.size());
  return SUCCESS;
}

Code cuDeviceGet(int* device, int ordinal) {
  CALL(cuDeviceGet);
  if (!device) return INVALID_VALUE;
  if (!device_of(ordinal)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

Code cuDeviceGetName(char* name, int length, int device) {
  CALL(cuDeviceGetName);
  const Device* d = device_of(device);
  if (!d) return INVALID_DEVICE;
  if (!name || length < 1) return INVALID_VALUE;
  snprintf(name, size_t(length), "stand-in sm_%d", d->capability);
  return SUCCESS;
}

Code cuDeviceGetUuid_v2(void* uuid, int device) {
  CALL(cuDeviceGetUuid_v2);
  if (!device_of(device)) return INVALID_DEVICE;
  if (!uuid) return INVALID_VALUE;
  memset(uuid, 0x51 + device, 16);
  return SUCCESS;
}

Code cuDeviceGetAttribute(int* value, int attribute, int device) {
  CALL(cuDeviceGetAttribute);
  const Device* d = device_of(device);
  if (!d) return INVALID_DEVICE;
  bool known = false;
  const int answer = d->attribute(attribute, known);
  if (!value || !known) return INVALID_VALUE;
  *value = answer;
  return SUCCESS;
}

Code cuDeviceTotalMem_v2(size_t* bytes, int device) {
  CALL(cuDeviceTotalMem_v2);
  if (!device_of(device)) return INVALID_DEVICE;
  if (!bytes) return INVALID_VALUE;
  *bytes = DEVICE_MEMORY;
  return SUCCESS;
}

Code cuDevicePrimaryCtxRetain(void** context, int device) {
  CALL(cuDevicePrimaryCtxRetain);
  Device* d = device_of(device);
  if (!d) return INVALID_DEVICE;
  if (!context) return INVALID_VALUE;
  if (!d->primary) d->primary = create(device, true);
  d->primary->retained++;
  *context = d->primary;
  return SUCCESS;
}

Code cuDevicePrimaryCtxRelease_v2(int device) {
  CALL(cuDevicePrimaryCtxRelease_v2);
  Device* d = device_of(device);
  if (!d) return INVALID_DEVICE;
  if (!d->primary) return INVALID_CONTEXT;
  if (--d->primary->retained == 0) destroy(d->primary);
  return SUCCESS;
}

Code cuCtxCreate_v4(void** context, void* params, unsigned, int device) {
  CALL(cuCtxCreate_v4);
  if (!device_of(device)) return INVALID_DEVICE;
  if (!context) return INVALID_VALUE;
  if (params) return NOT_SUPPORTED;
  Context* made = create(device, false);
  current_stack.push_back(made);
  *context = made;
  return SUCCESS;
}

Code cuCtxDestroy_v2(void* context) {
  CALL(cuCtxDestroy_v2);
  auto* c = static_cast<Context*>(context);
  if (!state().contexts.count(c)) return INVALID_CONTEXT;
  if (c->primary) return INVALID_CONTEXT;
  destroy(c);
  if (!current_stack.empty() && current_stack.back() == c) current_stack.pop_back();
  return SUCCESS;
}

Code cuCtxGetCurrent(void** context) {
  CALL(cuCtxGetCurrent);
  if (!context) return INVALID_VALUE;
  *context = current_stack.empty() ? nullptr : current_stack.back();
  return SUCCESS;
}

Code cuCtxSetCurrent(void* context) {
  CALL(cuCtxSetCurrent);
  auto* c = static_cast<Context*>(context);
  if (c && !state().contexts.count(c)) return INVALID_CONTEXT;
  if (!current_stack.empty()) current_stack.pop_back();
  if (c) current_stack.push_back(c);
  return SUCCESS;
}

Code cuCtxPushCurrent_v2(void* context) {
  CALL(cuCtxPushCurrent_v2);
  auto* c = static_cast<Context*>(context);
  if (!state().contexts.count(c)) return INVALID_CONTEXT;
  current_stack.push_back(c);
  return SUCCESS;
}

Code cuCtxPopCurrent_v2(void** context) {
  CALL(cuCtxPopCurrent_v2);
  if (current_stack.empty()) return INVALID_CONTEXT;
  if (context) *context = current_stack.back();
  current_stack.pop_back();
  return SUCCESS;
}

Code cuCtxGetDevice(int* device) {
  CALL(cuCtxGetDevice);
  if (!current()) return INVALID_CONTEXT;
  if (!device) return INVALID_VALUE;
  *device = current()->device;
  return SUCCESS;
}

Code cuCtxSynchronize() {
  CALL(cuCtxSynchronize);
  if (Code code = usable(current())) return code;
  for (Stream* stream : current()->streams)
    if (stream->capture) return forbidden_on(*stream);
  drain(*current());
  return current()->sticky;
}

Code cuGetErrorName(uint32_t code, const char** name) {
  // Neither counted nor refused: it is how a failure is told.
  if (!name) return INVALID_VALUE;
  *name = name_of(code);
  return *name ? SUCCESS : INVALID_VALUE;
}

Code cuGetErrorString(uint32_t code, const char** text) { return cuGetErrorName(code, text); }
