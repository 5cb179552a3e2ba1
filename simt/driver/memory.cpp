// Device memory: places that are given out once, poisoned when they are and when they are taken back.
#include <cstdlib>
#include <cstring>
#include <new>

#include "exports.hpp"
#include "state.hpp"

namespace driver {
namespace {

constexpr size_t ALIGNMENT = 256;
constexpr int POISON = 0xff;  // NaN in every float type

struct Found {
  uintptr_t base;
  Allocation* allocation;
};

// The place that an address lies in, freed or not.
Found place_of(uintptr_t address) {
  std::map<uintptr_t, Allocation>& memory = state().memory;
  auto above = memory.upper_bound(address);
  if (above == memory.begin()) return {0, nullptr};
  auto& [base, allocation] = *std::prev(above);
  return address <= base + allocation.bytes ? Found{base, &allocation} : Found{0, nullptr};
}

Code allocate(Context& context, uint64_t* pointer, size_t bytes) {
  Driver& d = state();
  if (!pointer || bytes == 0) return INVALID_VALUE;
  size_t taken = 0;
  for (auto& [base, allocation] : d.memory)
    if (!allocation.freed && allocation.context->device == context.device) taken += allocation.bytes;
  if (bytes > DEVICE_MEMORY - taken) return OUT_OF_MEMORY;
  const size_t rounded = (bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  void* place = aligned_alloc(ALIGNMENT, rounded);
  if (!place) return OUT_OF_MEMORY;
  memset(place, POISON, rounded);
  d.memory[reinterpret_cast<uintptr_t>(place)] = {&context, bytes, ++d.allocations};
  *pointer = reinterpret_cast<uint64_t>(place);
  return SUCCESS;
}

// Freed places are given back to the host only when there are many, so that a dangling pointer meets poison.
void reclaim() {
  constexpr size_t KEPT = size_t(1) << 29;
  std::map<uintptr_t, Allocation>& memory = state().memory;
  size_t freed = 0;
  for (auto& [base, allocation] : memory) freed += allocation.freed ? allocation.bytes : 0;
  for (auto it = memory.begin(); freed > KEPT && it != memory.end();) {
    if (!it->second.freed) {
      ++it;
      continue;
    }
    freed -= it->second.bytes;
    free(reinterpret_cast<void*>(it->first));
    it = memory.erase(it);
  }
}

Code release(uintptr_t base) {
  auto it = state().memory.find(base);
  if (it == state().memory.end() || it->second.freed) return ILLEGAL_ADDRESS;
  it->second.freed = true;
  memset(reinterpret_cast<void*>(base), POISON, it->second.bytes);
  reclaim();
  return SUCCESS;
}

bool is_live_start(uintptr_t address) {
  auto it = state().memory.find(address);
  return it != state().memory.end() && !it->second.freed;
}

bool is_pinned(const void* pointer, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (auto& [base, length] : state().pinned)
    if (address >= base && address + bytes <= base + length) return true;
  return false;
}

// A copy whose ends are checked when it is asked for, and again when it is made.
Code copy_device(Stream& stream, uintptr_t to, uintptr_t from, size_t bytes, std::shared_ptr<std::vector<char>> staged,
                 void* host_to, const void* host_from) {
  return enqueue(stream, [=] {
    if ((!host_to && !find(to, bytes)) || (!host_from && !staged && !find(from, bytes))) {
      state().fault = "a copy of " + std::to_string(bytes) + " bytes: " + describe(host_to ? from : to);
      return ILLEGAL_ADDRESS;
    }
    const void* source = staged ? staged->data() : host_from ? host_from : reinterpret_cast<const void*>(from);
    memmove(host_to ? host_to : reinterpret_cast<void*>(to), source, bytes);
    return SUCCESS;
  });
}

Code to_device(Stream& stream, uint64_t to, const void* from, size_t bytes) {
  if (bytes == 0) return SUCCESS;
  if (!from || !find(to, bytes)) return INVALID_VALUE;
  if (is_pinned(from, bytes)) return copy_device(stream, to, 0, bytes, nullptr, nullptr, from);
  // The driver stages pageable memory before it returns. Under capture the address alone is kept.
  if (stream.capture) return copy_device(stream, to, 0, bytes, nullptr, nullptr, from);
  const char* begin = static_cast<const char*>(from);
  return copy_device(stream, to, 0, bytes, std::make_shared<std::vector<char>>(begin, begin + bytes), nullptr, nullptr);
}

Code to_host(Stream& stream, void* to, uint64_t from, size_t bytes) {
  if (bytes == 0) return SUCCESS;
  if (!to || !find(from, bytes)) return INVALID_VALUE;
  if (Code code = copy_device(stream, 0, from, bytes, nullptr, to, nullptr)) return code;
  if (stream.capture || is_pinned(to, bytes)) return SUCCESS;
  drain(stream);
  return stream.context->sticky;
}

Code between(Stream& stream, uint64_t to, uint64_t from, size_t bytes) {
  if (bytes == 0) return SUCCESS;
  if (!find(to, bytes) || !find(from, bytes)) return INVALID_VALUE;
  return copy_device(stream, to, from, bytes, nullptr, nullptr, nullptr);
}

Code set(Stream& stream, uint64_t pointer, unsigned char value, size_t count) {
  if (count == 0) return SUCCESS;
  if (!find(pointer, count)) return INVALID_VALUE;
  return enqueue(stream, [=] {
    if (!find(pointer, count)) {
      state().fault = "a fill of " + std::to_string(count) + " bytes: " + describe(pointer);
      return ILLEGAL_ADDRESS;
    }
    memset(reinterpret_cast<void*>(pointer), value, count);
    return SUCCESS;
  });
}

// The calls without `Async`: on the null stream, and done when they return.
template <class F>
Code and_wait(F call_on) {
  if (Code code = forbidden_in_capture()) return code;
  Stream* stream = nullptr;
  if (Code code = resolve(nullptr, stream)) return code;
  if (Code code = call_on(*stream)) return code;
  drain(*stream);
  return stream->context->sticky;
}

}  // namespace

Allocation* find(uintptr_t address, size_t bytes, uintptr_t* base) {
  const Found found = place_of(address);
  if (!found.allocation || found.allocation->freed || address + bytes > found.base + found.allocation->bytes)
    return nullptr;
  if (base) *base = found.base;
  return found.allocation;
}

std::string describe(uintptr_t address) {
  const Found found = place_of(address);
  if (!found.allocation) return "no allocation there";
  const Allocation& a = *found.allocation;
  return std::string(a.freed ? "freed " : "") + "allocation " + std::to_string(a.number) + " of " +
         std::to_string(a.bytes) + " bytes on device " + std::to_string(a.context->device);
}

}  // namespace driver

using namespace driver;

Code cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  CALL(cuMemAlloc_v2);
  if (Code code = usable(current())) return code;
  if (Code code = forbidden_in_capture()) return code;
  return allocate(*current(), pointer, bytes);
}

Code cuMemAllocAsync(uint64_t* pointer, size_t bytes, void* handle) {
  CALL(cuMemAllocAsync);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  if (stream->capture) return NOT_SUPPORTED;
  return allocate(*stream->context, pointer, bytes);
}

Code cuMemFree_v2(uint64_t pointer) {
  CALL(cuMemFree_v2);
  if (Code code = usable(current())) return code;
  if (pointer == 0) return SUCCESS;
  if (!is_live_start(pointer)) return INVALID_VALUE;
  if (Code code = forbidden_in_capture()) return code;
  drain(*state().memory[pointer].context);
  return release(pointer);
}

Code cuMemFreeAsync(uint64_t pointer, void* handle) {
  CALL(cuMemFreeAsync);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) {
    // After an error of the device its memory is as good as gone.
    if (code != INVALID_HANDLE && is_live_start(pointer)) release(pointer);
    return code;
  }
  if (stream->capture) return NOT_SUPPORTED;
  if (pointer == 0) return SUCCESS;
  if (!is_live_start(pointer)) return INVALID_VALUE;
  return enqueue(*stream, [=] { return release(pointer); });
}

Code cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  CALL(cuMemHostAlloc);
  if (Code code = usable(current())) return code;
  if (!pointer || bytes == 0) return INVALID_VALUE;
  void* place = malloc(bytes);
  if (!place) return OUT_OF_MEMORY;
  memset(place, POISON, bytes);
  state().pinned[reinterpret_cast<uintptr_t>(place)] = bytes;
  *pointer = place;
  return SUCCESS;
}

Code cuMemFreeHost(void* pointer) {
  CALL(cuMemFreeHost);
  if (!state().pinned.erase(reinterpret_cast<uintptr_t>(pointer))) return INVALID_VALUE;
  free(pointer);
  return SUCCESS;
}

Code cuMemGetInfo_v2(size_t* available, size_t* total) {
  CALL(cuMemGetInfo_v2);
  if (Code code = usable(current())) return code;
  if (!available || !total) return INVALID_VALUE;
  *available = *total = DEVICE_MEMORY;
  for (auto& [base, allocation] : state().memory)
    if (!allocation.freed && allocation.context->device == current()->device) *available -= allocation.bytes;
  return SUCCESS;
}

Code cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  CALL(cuMemcpyHtoD_v2);
  return and_wait([=](Stream& stream) { return to_device(stream, to, from, bytes); });
}

Code cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* handle) {
  CALL(cuMemcpyHtoDAsync_v2);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  return to_device(*stream, to, from, bytes);
}

Code cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  CALL(cuMemcpyDtoH_v2);
  return and_wait([=](Stream& stream) { return to_host(stream, to, from, bytes); });
}

Code cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* handle) {
  CALL(cuMemcpyDtoHAsync_v2);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  return to_host(*stream, to, from, bytes);
}

Code cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
  CALL(cuMemcpyDtoD_v2);
  return and_wait([=](Stream& stream) { return between(stream, to, from, bytes); });
}

Code cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* handle) {
  CALL(cuMemcpyDtoDAsync_v2);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  return between(*stream, to, from, bytes);
}

Code cuMemcpyPeerAsync(uint64_t to, void* to_context, uint64_t from, void* from_context, size_t bytes, void* handle) {
  CALL(cuMemcpyPeerAsync);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  const Allocation *target = find(to, bytes), *source = find(from, bytes);
  if (!target || !source || target->context != to_context || source->context != from_context) return INVALID_VALUE;
  return between(*stream, to, from, bytes);
}

Code cuMemsetD8_v2(uint64_t pointer, unsigned char value, size_t count) {
  CALL(cuMemsetD8_v2);
  return and_wait([=](Stream& stream) { return set(stream, pointer, value, count); });
}

Code cuMemsetD8Async(uint64_t pointer, unsigned char value, size_t count, void* handle) {
  CALL(cuMemsetD8Async);
  Stream* stream = nullptr;
  if (Code code = resolve(handle, stream)) return code;
  return set(*stream, pointer, value, count);
}
