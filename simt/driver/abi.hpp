// The part of cuda.h that the stand-in driver answers to, under names of its own: numbers are the driver's.
#pragma once
#include <cstddef>
#include <cstdint>

namespace driver {

enum Code : uint32_t {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  INVALID_PTX = 218,
  UNSUPPORTED_PTX_VERSION = 222,
  INVALID_HANDLE = 400,
  ILLEGAL_STATE = 401,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  CONTEXT_IS_DESTROYED = 709,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
  STREAM_CAPTURE_UNSUPPORTED = 900,
  STREAM_CAPTURE_INVALIDATED = 901,
  STREAM_CAPTURE_UNMATCHED = 903,
  STREAM_CAPTURE_UNJOINED = 904,
  STREAM_CAPTURE_ISOLATION = 905,
  STREAM_CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907,
  STREAM_CAPTURE_WRONG_THREAD = 908,
};

// CUdevice_attribute
enum Attribute : int {
  MAX_THREADS_PER_BLOCK = 1,
  MAX_SHARED_MEMORY_PER_BLOCK = 8,
  WARP_SIZE = 10,
  MAX_REGISTERS_PER_BLOCK = 12,
  MULTIPROCESSOR_COUNT = 16,
  UNIFIED_ADDRESSING = 41,
  COMPUTE_CAPABILITY_MAJOR = 75,
  COMPUTE_CAPABILITY_MINOR = 76,
  MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
  MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
  MEMORY_POOLS_SUPPORTED = 115,
};

constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;  // CUfunction_attribute
constexpr uint32_t STREAM_NON_BLOCKING = 1;
constexpr uint32_t EVENT_DISABLE_TIMING = 2;

// CUstreamCaptureMode
enum class CaptureMode : uint32_t { Global = 0, ThreadLocal = 1, Relaxed = 2 };
// CUstreamCaptureStatus
enum class CaptureStatus : uint32_t { None = 0, Active = 1, Invalidated = 2 };

// What a stream handle may be besides a stream.
constexpr uintptr_t NULL_STREAM = 0, LEGACY_STREAM = 1, PER_THREAD_STREAM = 2;

const char* name_of(uint32_t code);

}  // namespace driver
