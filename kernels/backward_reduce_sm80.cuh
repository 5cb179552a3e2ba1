// Sums over parts that other kernels left in f32: of the gradients of keys, values and biases that several blocks shared, and
// of g for the gradients of gates and regions.
//
//   to[n] = Σ_t parts[n, t] · factor[n, t]        in the order of t: two runs give the same bits
//
// Many short sums take a thread each, few long ones a block.
#pragma once
#include "params.h"
#include "tile/layout.cuh"

template <class Element_>
struct BackwardReduceConfig {
  using Element = Element_;
  static constexpr int THREADS = 128;
  static constexpr int shared_bytes(int /* branches */, int /* key_tiles */, int /* gradient_tiles */) { return THREADS * 4; }
};

// An index along up to four extents, the last fastest, taken apart.
template <int N>
DEVICE int64_t offset_of(int64_t index, const int32_t (&extent)[N], const int64_t (&stride)[N]) {
  int64_t offset = 0;
#pragma unroll
  for (int dim = N - 1; dim >= 0; dim--) {
    offset += index % extent[dim] * stride[dim];
    index /= extent[dim];
  }
  return offset;
}

template <class Config>
DEVICE void backward_reduce(const ReduceParams& p) {
  int number = 0, block = blockIdx.x;
  for (; block >= p.sum[number].blocks; number++) block -= p.sum[number].blocks;
  const SumParams& sum = p.sum[number];
  const int64_t count = int64_t(sum.extent[0]) * sum.extent[1] * sum.extent[2] * sum.extent[3];
  const bool together = sum.together != 0;
  const int64_t n = together ? block : int64_t(block) * Config::THREADS + threadIdx.x;

  float total = 0.0f;
  if (n < count) {
    const float* parts = sum.parts + offset_of(n, sum.extent, sum.parts_stride);
    const float* factor = sum.factor == nullptr ? nullptr : sum.factor + offset_of(n, sum.extent, sum.factor_stride);
    const int64_t(&step)[3] = sum.parts_term_stride, (&by)[3] = sum.factor_term_stride;
    for (int64_t i = 0; i < sum.terms[0]; i++) {
      for (int64_t j = 0; j < sum.terms[1]; j++) {
        for (int64_t k = together ? threadIdx.x : 0; k < sum.terms[2]; k += together ? Config::THREADS : 1) {
          const float weight = factor == nullptr ? sum.factor_value : factor[i * by[0] + j * by[1] + k * by[2]];
          total += parts[i * step[0] + j * step[1] + k * step[2]] * weight;
        }
      }
    }
  }
  if (together) {
    float* const sTotals = reinterpret_cast<float*>(ptx::dynamic_shared());
    sTotals[threadIdx.x] = total;
    for (int half = Config::THREADS / 2; half > 0; half /= 2) {
      // Written: the totals, each by its thread. Read next: the upper half of what is left, by the threads of the lower.
      ptx::barrier_cta();
      if (int(threadIdx.x) < half) sTotals[threadIdx.x] += sTotals[threadIdx.x + half];
    }
    total = sTotals[threadIdx.x];
  }
  if (n >= count || (together && threadIdx.x != 0)) return;
  const int64_t at = offset_of(n, sum.extent, sum.to_stride);
  if (sum.f32 != 0) {
    static_cast<float*>(sum.to)[at] = total;
  } else {
    static_cast<uint16_t*>(sum.to)[at] = uint16_t(Config::Element::pack(total, 0.0f));
  }
}
