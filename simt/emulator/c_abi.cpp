// The functions of c_abi.h.
#include "c_abi.h"

#include "launch.hpp"
#include "tensor_map.hpp"
#include "../ptx/program.hpp"

#include <cstdlib>
#include <cstring>

struct SimtResult {
  simt::Outcome outcome;
};

extern "C" {

SimtResult* simt_run(const SimtLaunch* launch) { return new SimtResult{simt::run(*launch)}; }

SimtFaultKind simt_result_fault(const SimtResult* result, const char** message) {
  *message = result->outcome.fault.message.c_str();
  return result->outcome.fault.kind;
}

const SimtStats* simt_result_stats(const SimtResult* result) { return &result->outcome.stats; }

const SimtBufferStats* simt_result_buffers(const SimtResult* result, size_t* count) {
  *count = result->outcome.buffers.size();
  return result->outcome.buffers.data();
}

const SimtSite* simt_result_sites(const SimtResult* result, size_t* count) {
  *count = result->outcome.sites.size();
  return result->outcome.sites.data();
}

void simt_result_free(SimtResult* result) { delete result; }

const void* simt_ptx_parse(const char* text, const char* kernel, char** error) {
  auto* program = new simt::Program();
  std::string wrong;
  if (simt::parse_ptx(text, kernel, *program, wrong)) return program;
  delete program;
  *error = strdup(wrong.c_str());
  return nullptr;
}
size_t simt_ptx_param_bytes(const void* program) { return static_cast<const simt::Program*>(program)->param_bytes; }
void simt_ptx_free(const void* program) { delete static_cast<const simt::Program*>(program); }

const char* simt_encode_tensor_map(void* map, const void* base, const uint64_t dimensions[4], const uint64_t strides[3],
                                   const uint32_t box[4], uint32_t swizzle_bytes) {
  simt::TensorLayout layout;
  uint64_t d[4], s[3];
  uint32_t b[4];
  memcpy(d, dimensions, sizeof d);
  memcpy(s, strides, sizeof s);
  memcpy(b, box, sizeof b);
  if (const char* broken = simt::encode(layout, base, d, s, b, swizzle_bytes)) return broken;
  memset(map, 0, 128);
  memcpy(map, &layout, sizeof layout);
  return nullptr;
}

char* simt_locations(const uint32_t* pcs, size_t count) {
  std::string lines;
  for (size_t i = 0; i < count; i++) lines += simt::at(pcs[i]) + "\n";
  return strdup(simt::symbolise(lines).c_str());
}

void simt_text_free(char* text) { free(text); }

}  // extern "C"
