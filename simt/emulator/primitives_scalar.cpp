// Addresses, exchange between lanes, arithmetic, conversion, and CUDA's built-in indices.
#include <cmath>
#include <cstring>

#include "../../kernels/ptx/contract.h"
#include "half.hpp"
#include "scheduler.hpp"

namespace simt {

Index thread_index() { return {self->x, self->y, self->z}; }
Index block_index() { return {block->x, block->y, block->z}; }
Index block_dimensions() {
  const auto& size = block->launch->request->block;
  return {size[0], size[1], size[2]};
}
Index grid_dimensions() {
  const auto& size = block->launch->request->grid;
  return {size[0], size[1], size[2]};
}

namespace {

struct ShuffleLane {
  float value, result;
  uint32_t operand;
};

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace
}  // namespace simt

namespace ptx {

using namespace simt;

char* dynamic_shared() { return block->shared; }

uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - block->shared;
  // One past the end is an address, though not one to access.
  if (offset < 0 || offset > ptrdiff_t(block->shared_bytes))
    fail(SIMT_SHARED_BOUNDS, "shared_address of a pointer that is not into shared memory (", at(SIMT_CALLER), ")");
  return SHARED_BASE + uint32_t(offset);
}

float shfl_bfly_f32(float value, uint32_t lane_mask) {
  ShuffleLane mine{value, 0, lane_mask};
  collective(Op::ShflBfly, SIMT_CALLER, mine, [](Warp&, auto& lanes) {
    for (uint32_t lane = 0; lane < LANES; lane++)
      lanes[lane]->result = lanes[(lane ^ lanes[lane]->operand) % LANES]->value;
  });
  return mine.result;
}

float shfl_idx_f32(float value, uint32_t source_lane) {
  ShuffleLane mine{value, 0, source_lane};
  collective(Op::ShflIdx, SIMT_CALLER, mine, [](Warp&, auto& lanes) {
    for (int lane = 0; lane < LANES; lane++) lanes[lane]->result = lanes[lanes[lane]->operand % LANES]->value;
  });
  return mine.result;
}

uint32_t shfl_idx_b32(uint32_t value, uint32_t source_lane) {
  ShuffleLane mine{0, 0, source_lane};
  memcpy(&mine.value, &value, sizeof value);
  collective(Op::ShflIdx, SIMT_CALLER, mine, [](Warp&, auto& lanes) {
    for (int lane = 0; lane < LANES; lane++)
      memcpy(&lanes[lane]->result, &lanes[lanes[lane]->operand % LANES]->value, sizeof(uint32_t));
  });
  memcpy(&value, &mine.result, sizeof value);
  return value;
}

float ex2_approx_ftz_f32(float x) { return flush(exp2f(flush(x))); }
float lg2_approx_ftz_f32(float x) { return log2f(flush(x)); }
float rcp_approx_ftz_f32(float x) { return flush(1.0f / flush(x)); }
float max_f32(float a, float b) { return fmaxf(a, b); }
float fma_rn_f32(float a, float b, float c) { return fmaf(a, b, c); }

uint32_t cvt_rn_f16x2_f32(float hi, float lo) { return f16_of_f32(lo) | uint32_t(f16_of_f32(hi)) << 16; }
uint32_t cvt_rn_bf16x2_f32(float hi, float lo) { return bf16_of_f32(lo) | uint32_t(bf16_of_f32(hi)) << 16; }
float cvt_f32_f16(uint16_t bits) { return f32_of_f16(bits); }
float cvt_f32_bf16(uint16_t bits) { return f32_of_bf16(bits); }

}  // namespace ptx
