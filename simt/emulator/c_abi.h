/* The border between the emulator (C++) and its Rust face: plain data and a few functions. src/ffi.rs mirrors it. */
#ifndef SIMT_C_ABI_H
#define SIMT_C_ABI_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum SimtFaultKind {
  SIMT_NO_FAULT,
  SIMT_RACE,           /* shared memory: two accesses that nothing orders */
  SIMT_PENDING_COPY,   /* shared memory: touched while an asynchronous copy to it is in flight */
  SIMT_UNINITIALISED,  /* shared memory read before anything was written to it */
  SIMT_SHARED_BOUNDS,
  SIMT_GLOBAL_BOUNDS,
  SIMT_READ_ONLY,      /* write to a buffer registered as input */
  SIMT_BLOCK_RACE,     /* global memory: two blocks, nothing orders them */
  SIMT_DIVERGENCE,     /* lanes of one warp at different warp-wide instructions */
  SIMT_BARRIER,        /* a barrier used inconsistently */
  SIMT_DEADLOCK,
  SIMT_COPY_AT_EXIT,   /* a thread exits while its asynchronous copies are in flight */
  SIMT_MISALIGNED,
  SIMT_FOREIGN_STACK,  /* another thread's local memory */
  SIMT_STACK_OVERFLOW, /* more local memory than a fiber's stack holds */
  SIMT_PROXY,          /* the async proxy uses what plain stores wrote, without a fence towards it */
  SIMT_MBARRIER,       /* an mbarrier used as its state does not allow */
  SIMT_WGMMA,          /* wgmma without its fence, or its operands touched while it is in flight */
  SIMT_REGISTERS,      /* setmaxnreg with an impossible count */
  SIMT_UNSUPPORTED,    /* legal, but not modelled */
  SIMT_BAD_LAUNCH
} SimtFaultKind;

typedef struct SimtBuffer {
  void* data;
  size_t bytes;
  uint8_t writable;
  const char* name; /* for messages */
} SimtBuffer;

typedef struct SimtLaunch {
  void (*entry)(const void* params);
  const void* program; /* of simt_ptx_parse, to interpret in place of the entry; NULL: none */
  const void* params;
  size_t params_bytes;
  uint32_t grid[3], block[3];
  uint32_t shared_bytes;
  uint32_t workers; /* OS threads, each running one block at a time */
  uint64_t seed;
  uint32_t registers; /* per thread; 0: as many as one block per multiprocessor may have */
  uint8_t checks; /* 0: only execute */
  const SimtBuffer* buffers;
  size_t buffer_count;
  const uint32_t* dropped; /* synchronisation sites to turn into no-ops */
  size_t dropped_count;
} SimtLaunch;

typedef struct SimtStats {
  uint64_t collectives, mma, ldmatrix_phases, ldmatrix_conflicts, cp_async_phases, cp_async_conflicts;
  uint64_t shared_phases, shared_conflicts, barriers, warp_barriers, atomics, switches, wgmma, bulk_bytes;
} SimtStats;

typedef struct SimtBufferStats {
  uint64_t read, read_async, written, atomic; /* bytes */
} SimtBufferStats;

typedef struct SimtSite {
  uint32_t pc;
  const char* what; /* a literal */
  uint64_t executed;
} SimtSite;

typedef struct SimtResult SimtResult;

SimtResult* simt_run(const SimtLaunch* launch);
SimtFaultKind simt_result_fault(const SimtResult* result, const char** message);
const SimtStats* simt_result_stats(const SimtResult* result);
const SimtBufferStats* simt_result_buffers(const SimtResult* result, size_t* count);
const SimtSite* simt_result_sites(const SimtResult* result, size_t* count);
void simt_result_free(SimtResult* result);

/* Reads a kernel of a PTX module. NULL if something in it is wrong or not known: then `error` is a text to be freed. */
const void* simt_ptx_parse(const char* text, const char* kernel, char** error);
size_t simt_ptx_param_bytes(const void* program);
void simt_ptx_free(const void* program);

/* Encodes a tensor map for cp.async.bulk.tensor into 128 bytes: four dimensions of 16-bit elements, strides in bytes of
 * the outer three. Returns the rule that is broken, a literal, or NULL. */
const char* simt_encode_tensor_map(void* map, const void* base, const uint64_t dimensions[4], const uint64_t strides[3],
                                   const uint32_t box[4], uint32_t swizzle_bytes);

/* The source lines of sites, one line of text each. Slow the first time. */
char* simt_locations(const uint32_t* pcs, size_t count);
void simt_text_free(char* text);

#ifdef __cplusplus
}
#endif
#endif
