// Loading kernels and running them under the emulator, every access checked.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "../emulator/c_abi.h"
#include "exports.hpp"
#include "state.hpp"

namespace driver {
namespace {

constexpr uint32_t DEFAULT_SHARED = 48 << 10;

// A part of a parameter block, which starts as aligned as tensor maps want it.
struct alignas(64) Line {
  char bytes[64];
};

// The fields of cuTensorMapEncodeTiled that are modelled (cuda.h).
constexpr unsigned FLOAT16 = 6, BFLOAT16 = 9, NO_INTERLEAVE = 0, NO_SWIZZLE = 0, SWIZZLE_128B = 3, ZERO_FILL = 0;

Library* load(const void* data, Context* context, Code& code) {
  Image image;
  code = parse(data, state().version, image);
  if (code) return nullptr;
  auto* library = new Library{std::move(image), context};
  state().libraries.insert(library);
  return library;
}

Code unload(void* handle) {
  auto* library = static_cast<Library*>(handle);
  Driver& d = state();
  if (!d.libraries.erase(library)) return INVALID_HANDLE;
  for (auto it = d.functions.begin(); it != d.functions.end();)
    if ((*it)->library == library) {
      delete *it;
      it = d.functions.erase(it);
    } else {
      ++it;
    }
  delete library;
  return SUCCESS;
}

// Machine code cannot be run: its source can, compiled for the emulator under the same name.
Code find_registered(Function& function) {
  const SimtRegisteredKernel* kernel = simt_registered_kernels;
  while (kernel->name && kernel->name != function.name) kernel++;
  if (!kernel->name) {
    fprintf(stderr, "stand-in driver: %s was not compiled for the emulator\n", function.name.c_str());
    return NOT_FOUND;
  }
  function.kernel = kernel;
  function.params_bytes = kernel->params_bytes;
  return SUCCESS;
}

// PTX is run as it is.
Code read_program(Function& function) {
  char* error = nullptr;
  const void* program = simt_ptx_parse(function.library->image.text.c_str(), function.name.c_str(), &error);
  if (!program) {
    fprintf(stderr, "stand-in driver: %s: %s\n", function.name.c_str(), error);
    simt_text_free(error);
    return INVALID_PTX;
  }
  function.program = {program, &simt_ptx_free};
  function.params_bytes = simt_ptx_param_bytes(program);
  return SUCCESS;
}

Code function_of(void** function, void* handle, const char* name) {
  auto* library = static_cast<Library*>(handle);
  Driver& d = state();
  if (!d.libraries.count(library)) return INVALID_HANDLE;
  if (!function || !name) return INVALID_VALUE;
  const std::vector<std::string>& names = library->image.names;
  if (std::find(names.begin(), names.end(), name) == names.end()) return NOT_FOUND;
  auto known = std::find_if(d.functions.begin(), d.functions.end(), [&](const Function* f) {
    return f->library == library && f->name == name;
  });
  if (known == d.functions.end()) {
    auto* made = new Function{library, name, nullptr, nullptr, 0, {}};
    if (Code code = library->image.ptx ? read_program(*made) : find_registered(*made)) {
      delete made;
      return code;
    }
    known = d.functions.insert(made).first;
  }
  *function = *known;
  return SUCCESS;
}

Code allow_shared(void* handle, int attribute, int value, int device) {
  auto* function = static_cast<Function*>(handle);
  Driver& d = state();
  if (!d.functions.count(function)) return INVALID_HANDLE;
  if (device < 0 || size_t(device) >= d.devices.size()) return INVALID_DEVICE;
  if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return NOT_SUPPORTED;
  if (value < 0 || uint32_t(value) > d.devices[device].shared_optin()) return INVALID_VALUE;
  function->dynamic_shared[device] = value;
  return SUCCESS;
}

// A kernel at its turn: on the memory that its context has now.
Code execute(Context& context, const SimtRegisteredKernel* kernel, const void* program, const LaunchRecord& record,
             const std::vector<Line>& params, size_t params_bytes) {
  Driver& d = state();
  d.launches.push_back(record);
  if (d.fail_execution && --d.fail_execution == 0) return d.execution_code;
  std::vector<std::string> names;
  std::vector<SimtBuffer> buffers;
  for (auto& [base, allocation] : d.memory) {
    if (allocation.freed || allocation.context != &context) continue;
    names.push_back("allocation " + std::to_string(allocation.number));
    buffers.push_back({reinterpret_cast<void*>(base), allocation.bytes, 1, nullptr});
  }
  for (size_t i = 0; i < buffers.size(); i++) buffers[i].name = names[i].c_str();
  SimtLaunch launch{};
  launch.entry = kernel ? kernel->entry : nullptr;
  launch.program = program;
  launch.params = params.data();
  launch.params_bytes = params_bytes;
  std::copy_n(record.grid, 3, launch.grid);
  std::copy_n(record.block, 3, launch.block);
  launch.shared_bytes = record.shared_bytes;
  launch.workers = std::max(1u, std::thread::hardware_concurrency());
  launch.seed = d.random();
  launch.checks = 1;
  launch.buffers = buffers.data();
  launch.buffer_count = buffers.size();
  SimtResult* result = simt_run(&launch);
  const char* message = nullptr;
  const SimtFaultKind fault = simt_result_fault(result, &message);
  if (fault != SIMT_NO_FAULT) {
    d.fault = record.kernel + ": " + message;
    fprintf(stderr, "stand-in driver: %s\n", d.fault.c_str());
  }
  simt_result_free(result);
  switch (fault) {
    case SIMT_NO_FAULT: return SUCCESS;
    case SIMT_GLOBAL_BOUNDS: return ILLEGAL_ADDRESS;
    default: return LAUNCH_FAILED;
  }
}

}  // namespace
}  // namespace driver

using namespace driver;

Code cuModuleLoadData(void** module, const void* image) {
  CALL(cuModuleLoadData);
  if (Code code = usable(current())) return code;
  if (!module || !image) return INVALID_VALUE;
  if (Code code = forbidden_in_capture()) return code;
  Code code = SUCCESS;
  Library* library = load(image, current(), code);
  if (code) return code;
  const int capability = state().devices[current()->device].capability;
  if (!library->image.loads_on(capability)) {
    const bool ptx = library->image.ptx;
    unload(library);
    return ptx ? INVALID_PTX : NO_BINARY_FOR_GPU;
  }
  *module = library;
  return SUCCESS;
}

Code cuModuleGetFunction(void** function, void* module, const char* name) {
  CALL(cuModuleGetFunction);
  if (Code code = usable(current())) return code;
  return function_of(function, module, name);
}

Code cuModuleUnload(void* module) {
  CALL(cuModuleUnload);
  if (Code code = forbidden_in_capture()) return code;
  return unload(module);
}

Code cuFuncSetAttribute(void* function, int attribute, int value) {
  CALL(cuFuncSetAttribute);
  if (Code code = usable(current())) return code;
  return allow_shared(function, attribute, value, current()->device);
}

Code cuLibraryLoadData(void** library, const void* image, void*, void*, unsigned jit_count, void*, void*,
                       unsigned count) {
  CALL(cuLibraryLoadData);
  if (!library || !image) return INVALID_VALUE;
  if (jit_count || count) return NOT_SUPPORTED;
  if (Code code = forbidden_in_capture()) return code;
  Code code = SUCCESS;
  Library* made = load(image, nullptr, code);
  if (code) return code;
  *library = made;
  return SUCCESS;
}

Code cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  CALL(cuLibraryGetKernel);
  return function_of(kernel, library, name);
}

Code cuLibraryUnload(void* library) {
  CALL(cuLibraryUnload);
  if (Code code = forbidden_in_capture()) return code;
  return unload(library);
}

Code cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  CALL(cuKernelSetAttribute);
  return allow_shared(kernel, attribute, value, device);
}

Code cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                    unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream_handle, void** params,
                    void** extra) {
  CALL(cuLaunchKernel);
  auto* function = static_cast<Function*>(handle);
  Driver& d = state();
  if (!d.functions.count(function)) return INVALID_HANDLE;
  Stream* stream = nullptr;
  if (Code code = resolve(stream_handle, stream)) return code;
  Context& context = *stream->context;
  const Library& library = *function->library;
  if (library.context && library.context != &context) return INVALID_HANDLE;
  const Device& device = d.devices[context.device];
  if (!library.image.loads_on(device.capability)) return NO_BINARY_FOR_GPU;

  const LaunchRecord record{function->name, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z},
                            shared_bytes};
  const uint64_t threads = uint64_t(block_x) * block_y * block_z;
  if (!grid_x || !grid_y || !grid_z || grid_x > 0x7fffffff || grid_y > 65535 || grid_z > 65535) return INVALID_VALUE;
  if (!threads || threads > 1024) return INVALID_VALUE;
  const auto allowed = function->dynamic_shared.find(context.device);
  const uint32_t most = allowed == function->dynamic_shared.end() ? DEFAULT_SHARED : uint32_t(allowed->second);
  if (shared_bytes > std::max(most, DEFAULT_SHARED)) return INVALID_VALUE;
  if (!params || !params[0] || extra) return INVALID_VALUE;

  const size_t bytes = function->params_bytes;
  std::vector<Line> copied((bytes + sizeof(Line) - 1) / sizeof(Line));
  memcpy(copied.data(), params[0], bytes);
  return enqueue(*stream, [&context, kernel = function->kernel, program = function->program, record,
                           copied = std::move(copied), bytes] {
    return execute(context, kernel, program.get(), record, copied, bytes);
  });
}

Code cuTensorMapEncodeTiled(void* map, unsigned type, unsigned rank, void* base, const uint64_t* extents, const uint64_t* strides,
                            const uint32_t* box, const uint32_t* element_strides, unsigned interleave, unsigned swizzle, unsigned,
                            unsigned fill) {
  CALL(cuTensorMapEncodeTiled);
  if (!map || reinterpret_cast<uintptr_t>(map) % 64 || !extents || !strides || !box || !element_strides) return INVALID_VALUE;
  if ((type != FLOAT16 && type != BFLOAT16) || rank != 4 || interleave != NO_INTERLEAVE || fill != ZERO_FILL) return NOT_SUPPORTED;
  if (swizzle != NO_SWIZZLE && swizzle != SWIZZLE_128B) return NOT_SUPPORTED;
  for (unsigned i = 0; i < rank; i++)
    if (element_strides[i] != 1) return NOT_SUPPORTED;
  const char* broken = simt_encode_tensor_map(map, base, extents, strides, box, swizzle == SWIZZLE_128B ? 128 : 0);
  if (broken) fprintf(stderr, "stand-in driver: cuTensorMapEncodeTiled: %s\n", broken);
  return broken ? INVALID_VALUE : SUCCESS;
}
