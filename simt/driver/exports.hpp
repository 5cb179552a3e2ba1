// The functions that the library exports. The types are those of cuda.h where the call passes plain data, and void*
// where it passes a handle.
#pragma once
#include <cstddef>
#include <cstdint>

#include "abi.hpp"

using driver::Code;

constexpr size_t DEVICE_MEMORY = size_t(1) << 32;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Code cuInit(unsigned flags);
EXPORT Code cuDriverGetVersion(int* version);
EXPORT Code cuDeviceGetCount(int* count);
EXPORT Code cuDeviceGet(int* device, int ordinal);
EXPORT Code cuDeviceGetName(char* name, int length, int device);
EXPORT Code cuDeviceGetUuid_v2(void* uuid, int device);
EXPORT Code cuDeviceGetAttribute(int* value, int attribute, int device);
EXPORT Code cuDeviceTotalMem_v2(size_t* bytes, int device);
EXPORT Code cuDevicePrimaryCtxRetain(void** context, int device);
EXPORT Code cuDevicePrimaryCtxRelease_v2(int device);
EXPORT Code cuCtxCreate_v4(void** context, void* params, unsigned flags, int device);
EXPORT Code cuCtxDestroy_v2(void* context);
EXPORT Code cuCtxGetCurrent(void** context);
EXPORT Code cuCtxSetCurrent(void* context);
EXPORT Code cuCtxPushCurrent_v2(void* context);
EXPORT Code cuCtxPopCurrent_v2(void** context);
EXPORT Code cuCtxGetDevice(int* device);
EXPORT Code cuCtxSynchronize();
EXPORT Code cuGetErrorName(uint32_t code, const char** name);
EXPORT Code cuGetErrorString(uint32_t code, const char** text);

EXPORT Code cuMemAlloc_v2(uint64_t* pointer, size_t bytes);
EXPORT Code cuMemAllocAsync(uint64_t* pointer, size_t bytes, void* stream);
EXPORT Code cuMemFree_v2(uint64_t pointer);
EXPORT Code cuMemFreeAsync(uint64_t pointer, void* stream);
EXPORT Code cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags);
EXPORT Code cuMemFreeHost(void* pointer);
EXPORT Code cuMemGetInfo_v2(size_t* free, size_t* total);
EXPORT Code cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes);
EXPORT Code cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream);
EXPORT Code cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes);
EXPORT Code cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream);
EXPORT Code cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes);
EXPORT Code cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream);
EXPORT Code cuMemcpyPeerAsync(uint64_t to, void* to_context, uint64_t from, void* from_context, size_t bytes,
                              void* stream);
EXPORT Code cuMemsetD8_v2(uint64_t pointer, unsigned char value, size_t count);
EXPORT Code cuMemsetD8Async(uint64_t pointer, unsigned char value, size_t count, void* stream);

EXPORT Code cuStreamCreate(void** stream, unsigned flags);
EXPORT Code cuStreamCreateWithPriority(void** stream, unsigned flags, int priority);
EXPORT Code cuStreamDestroy_v2(void* stream);
EXPORT Code cuStreamSynchronize(void* stream);
EXPORT Code cuStreamQuery(void* stream);
EXPORT Code cuStreamWaitEvent(void* stream, void* event, unsigned flags);
EXPORT Code cuStreamGetCtx(void* stream, void** context);
EXPORT Code cuLaunchHostFunc(void* stream, void (*function)(void*), void* data);
EXPORT Code cuEventCreate(void** event, unsigned flags);
EXPORT Code cuEventDestroy_v2(void* event);
EXPORT Code cuEventRecord(void* event, void* stream);
EXPORT Code cuEventQuery(void* event);
EXPORT Code cuEventSynchronize(void* event);
EXPORT Code cuEventElapsedTime(float* milliseconds, void* start, void* end);
EXPORT Code cuEventElapsedTime_v2(float* milliseconds, void* start, void* end);

EXPORT Code cuStreamBeginCapture_v2(void* stream, uint32_t mode);
EXPORT Code cuStreamEndCapture(void* stream, void** graph);
EXPORT Code cuStreamIsCapturing(void* stream, uint32_t* status);
EXPORT Code cuThreadExchangeStreamCaptureMode(uint32_t* mode);
EXPORT Code cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags);
EXPORT Code cuGraphUpload(void* exec, void* stream);
EXPORT Code cuGraphLaunch(void* exec, void* stream);
EXPORT Code cuGraphDestroy(void* graph);
EXPORT Code cuGraphExecDestroy(void* exec);

EXPORT Code cuModuleLoadData(void** module, const void* image);
EXPORT Code cuModuleGetFunction(void** function, void* module, const char* name);
EXPORT Code cuModuleUnload(void* module);
EXPORT Code cuFuncSetAttribute(void* function, int attribute, int value);
EXPORT Code cuLibraryLoadData(void** library, const void* image, void* jit_options, void* jit_values, unsigned jit_count,
                              void* options, void* values, unsigned count);
EXPORT Code cuLibraryGetKernel(void** kernel, void* library, const char* name);
EXPORT Code cuLibraryUnload(void* library);
EXPORT Code cuKernelSetAttribute(int attribute, int value, void* kernel, int device);
EXPORT Code cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** params,
                           void** extra);
EXPORT Code cuTensorMapEncodeTiled(void* map, unsigned type, unsigned rank, void* base, const uint64_t* extents,
                                   const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                   unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill);

// Observation and injected faults; not part of the driver. Texts live until the next call of the same function.
EXPORT const char* simt_driver_calls();  // one name a line, in order
EXPORT void simt_driver_forget_calls();
EXPORT void simt_driver_fail_call(uint64_t n, uint32_t code);       // the n-th call from now; 0: none
EXPORT void simt_driver_fail_execution(uint64_t n, uint32_t code);  // the n-th kernel to run from now
EXPORT const char* simt_driver_live();      // "contexts 1\nstreams 0\n…"
EXPORT const char* simt_driver_fault();     // what the emulator said of the last kernel that failed
EXPORT const char* simt_driver_launches();  // "name grid_x block_x shared_bytes" a line
