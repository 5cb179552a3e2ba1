// Which keys a query may attend to, and what is added to their logits.
#pragma once
#include "../params.h"
#include "layout.cuh"

// Keys [begin, end). Both ends grow with the query.
struct KeyRange {
  int begin;
  int end;
};

DEVICE int key_len_of(const SegmentParams& segment, int b) {
  if (segment.key_len == nullptr) return segment.seq_kv;
  // A length past the segment is the caller's mistake; memory beyond the segment is not read for it.
  const uint32_t length = segment.key_len[b * segment.key_len_stride];
  return length < uint32_t(segment.seq_kv) ? int(length) : segment.seq_kv;
}

// Causal rule, window and key length leave an interval. 64-bit: a centre may be far left of 0 and a window as wide as
// positions go.
DEVICE KeyRange keys_of_row(const SegmentParams& segment, int seq_q, int i, int key_len) {
  const int64_t centre = int64_t(i) + segment.seq_kv - seq_q;
  int64_t begin = 0, end = key_len;
  if (segment.causal == CAUSAL_TOP_LEFT) end = min_of(end, int64_t(i) + 1);
  if (segment.causal == CAUSAL_BOTTOM_RIGHT) end = min_of(end, centre + 1);
  if (segment.window_left >= 0) begin = max_of(begin, centre - segment.window_left);
  if (segment.window_right >= 0) end = min_of(end, centre + segment.window_right + 1);
  return {int(min_of(begin, int64_t(key_len))), int(max_of(end, int64_t(0)))};
}

// The bias of one query and key, or of a mask 0 and -inf.
DEVICE float bias_at(const SegmentParams& segment, int64_t offset) {
  switch (segment.bias_type) {
    case BIAS_F32: return static_cast<const float*>(segment.bias)[offset];
    case BIAS_F16: return ptx::cvt_f32_f16(static_cast<const uint16_t*>(segment.bias)[offset]);
    case BIAS_BF16: return ptx::cvt_f32_bf16(static_cast<const uint16_t*>(segment.bias)[offset]);
    default: return static_cast<const uint8_t*>(segment.bias)[offset] != 0 ? 0.0f : NEGATIVE_INFINITY;
  }
}

// tanh by one exponential: 1 - 2 / (e^2x + 1). Exact at both ends, absolute error about 1e-7 in between.
DEVICE float tanh_of(float x) { return 1.0f - 2.0f / (ptx::ex2_approx_ftz_f32(2.0f * LOG2E * x) + 1.0f); }

// One query block's view of a segment.
struct Mask {
  const SegmentParams& segment;
  int b, h, seq_q, key_len;

  // rS[16, COLUMNS]: products -> scaled products, capped (docs/math.md, equation 1).
  template <int COLUMNS>
  static DEVICE void cap(float (&rS)[COLUMNS / 8][4], const ForwardParams& p) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) rS[n][i] *= p.softmax_scale;
    }
    if (p.softcap != 0.0f) {
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) rS[n][i] = p.softcap * tanh_of(rS[n][i] / p.softcap);
      }
    }
  }

  // rS[16 queries, KEYS]: capped products -> logits, -inf where the query may not attend. The tile's first key is `kv`, the
  // warp's first query `row`. `open` says that every query of the block may attend to every key of the tile.
  template <int KEYS>
  DEVICE void admit(float (&rS)[KEYS / 8][4], int row, int kv, bool open) const {
    if (open && segment.bias_type == BIAS_NONE) return;
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      const KeyRange keys = keys_of_row(segment, seq_q, query, key_len);
      const int64_t bias = bias_of(query);
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; i++) admit_one(rS[n][i], query, kv + n * 8 + fragment_column(i), keys, bias);
      }
    }
  }

  // rS[16 keys, QUERIES], the transposed tile; the warp's first key is `kv`, the tile's first query `row`.
  template <int QUERIES>
  DEVICE void admit_transposed(float (&rS)[QUERIES / 8][4], int row, int kv, bool open) const {
    if (open && segment.bias_type == BIAS_NONE) return;
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int query = row + n * 8 + fragment_column(c);
        const KeyRange keys = keys_of_row(segment, seq_q, query, key_len);
        const int64_t bias = bias_of(query);
#pragma unroll
        for (int i = c; i < 4; i += 2) admit_one(rS[n][i], query, kv + fragment_row(i), keys, bias);
      }
    }
  }

 private:
  DEVICE int64_t bias_of(int query) const {
    return b * segment.bias_stride[0] + h * segment.bias_stride[1] + query * segment.bias_stride[2];
  }

  DEVICE void admit_one(float& s, int query, int key, const KeyRange& keys, int64_t bias) const {
    if (query >= seq_q || key < keys.begin || key >= keys.end) {
      s = NEGATIVE_INFINITY;
    } else if (segment.bias_type != BIAS_NONE) {
      s += bias_at(segment, bias + key * segment.bias_stride[3]);
    }
  }
};

// Of a block of queries and a tile of keys: whether every query may attend to every key.
DEVICE bool all_attend(const SegmentParams& segment, int seq_q, int row, int rows, int kv, int keys, int key_len) {
  const KeyRange first = keys_of_row(segment, seq_q, row, key_len);
  const KeyRange last = keys_of_row(segment, seq_q, row + rows - 1, key_len);
  return last.begin <= kv && kv + keys <= first.end;
}
