// Which keys a query may attend to, and what is added to their logits, for kernels that have no register to spare: 32-bit
// positions, one row at a time, masks before biases.
// The host guarantees: no position passes 2^29, and no window is wider than all positions.
#pragma once
#include "mask.cuh"

// As keys_of_row.
DEVICE KeyRange narrow_keys_of_row(const SegmentParams& segment, int seq_q, int i, int key_len) {
  const int centre = i + segment.seq_kv - seq_q;
  int begin = 0, end = key_len;
  if (segment.causal == CAUSAL_TOP_LEFT) end = min_of(end, i + 1);
  if (segment.causal == CAUSAL_BOTTOM_RIGHT) end = min_of(end, centre + 1);
  if (segment.window_left >= 0) begin = max_of(begin, centre - segment.window_left);
  if (segment.window_right >= 0) end = min_of(end, centre + segment.window_right + 1);
  return {min_of(begin, key_len), max_of(end, 0)};
}

// The keys that every query of a block may attend to. Both ends of a query's range grow with the query.
DEVICE KeyRange keys_of_all_rows(const SegmentParams& segment, int seq_q, int row, int rows, int key_len) {
  const int last = narrow_keys_of_row(segment, seq_q, row + rows - 1, key_len).begin;
  return {last, narrow_keys_of_row(segment, seq_q, row, key_len).end};
}

// rS[16, KEYS]: products -> scaled products, capped (docs/math.md, equation 1). tanh by one exponential and one reciprocal,
// absolute error about 1e-7: a division would be a call, and no call may be made while products run.
template <int KEYS>
DEVICE void cap_tile(float (&rS)[KEYS / 8][4], const ForwardParams& p) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) rS[n][i] *= p.softmax_scale;
  }
  if (p.softcap == 0.0f) return;
  const float to_power = 2.0f * LOG2E * ptx::rcp_approx_ftz_f32(p.softcap);
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float power = ptx::ex2_approx_ftz_f32(rS[n][i] * to_power);
      rS[n][i] = p.softcap * (1.0f - 2.0f * ptx::rcp_approx_ftz_f32(power + 1.0f));
    }
  }
}

// rS[16, KEYS]: -inf where the query may not attend. The tile's first key is `kv`, the warp's first query `row`.
template <int KEYS>
DEVICE void mask_tile(float (&rS)[KEYS / 8][4], const SegmentParams& segment, int seq_q, int row, int kv, int key_len) {
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++) {
    const int query = row + fragment_row(2 * r);
    KeyRange keys = narrow_keys_of_row(segment, seq_q, query, key_len);
    if (query >= seq_q) keys.end = 0;
    const int begin = keys.begin - kv - fragment_column(0), end = keys.end - kv - fragment_column(0);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float& s = rS[n][2 * r + c];
        s = n * 8 + c >= begin && n * 8 + c < end ? s : NEGATIVE_INFINITY;
      }
    }
  }
}

// One element of a bias, as f32.
struct F32Bias {
  using Element = float;
  static DEVICE float widen(float value) { return value; }
};
struct F16Bias {
  using Element = uint16_t;
  static DEVICE float widen(uint16_t bits) { return ptx::cvt_f32_f16(bits); }
};
struct Bf16Bias {
  using Element = uint16_t;
  static DEVICE float widen(uint16_t bits) { return ptx::cvt_f32_bf16(bits); }
};
struct BoolBias {
  using Element = uint8_t;
  static DEVICE float widen(uint8_t byte) { return byte != 0 ? 0.0f : NEGATIVE_INFINITY; }
};

// Two neighbours of a row.
template <class Element>
struct alignas(2 * sizeof(Element)) BiasPair {
  Element low, high;
};

// rS[16, KEYS] += bias, read only where the query may attend. `open` says that every query of the warp may attend to every key: then
// the two columns that a lane has next to each other are one load, if the bias lies so that they can be.
template <class Bias, int KEYS>
DEVICE void add_bias_of(float (&rS)[KEYS / 8][4], const SegmentParams& segment, int b, int h, int row, int kv, bool open) {
  using Element = typename Bias::Element;
  using Pair = BiasPair<Element>;
  const int64_t step = segment.bias_stride[3], pitch = segment.bias_stride[2];
  const Element* const gTile = static_cast<const Element*>(segment.bias) + b * segment.bias_stride[0] +
                               h * segment.bias_stride[1] + row * pitch + kv * step;
  const bool pairs = open && step == 1 && pitch % 2 == 0 && reinterpret_cast<uint64_t>(gTile) % sizeof(Pair) == 0;
#pragma unroll
  for (int r = 0; r < ROWS_PER_LANE; r++) {
    const Element* gBias = gTile + fragment_row(2 * r) * pitch + fragment_column(0) * step;
    if (pairs) {
      const Pair* gPairs = reinterpret_cast<const Pair*>(gBias);
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
        const Pair pair = gPairs[4 * n];
        rS[n][2 * r] += Bias::widen(pair.low);
        rS[n][2 * r + 1] += Bias::widen(pair.high);
      }
      continue;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++, gBias += 8 * step) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float& s = rS[n][2 * r + c];
        if (s != NEGATIVE_INFINITY) s += Bias::widen(gBias[c * step]);
      }
    }
  }
}
template <int KEYS>
DEVICE void add_bias(float (&rS)[KEYS / 8][4], const SegmentParams& segment, int b, int h, int row, int kv, bool open) {
  switch (segment.bias_type) {
    case BIAS_F32: return add_bias_of<F32Bias, KEYS>(rS, segment, b, h, row, kv, open);
    case BIAS_F16: return add_bias_of<F16Bias, KEYS>(rS, segment, b, h, row, kv, open);
    case BIAS_BF16: return add_bias_of<Bf16Bias, KEYS>(rS, segment, b, h, row, kv, open);
    case BIAS_BOOL: return add_bias_of<BoolBias, KEYS>(rS, segment, b, h, row, kv, open);
    default: return;
  }
}
