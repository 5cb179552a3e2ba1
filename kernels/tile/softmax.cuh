// The online softmax of the two rows that a lane holds a part of (docs/math.md, equations 4 to 6).
#pragma once
#include "layout.cuh"

// Over the four lanes that share a row.
DEVICE float quad_max(float value) {
  value = max_of(value, ptx::shfl_bfly_f32(value, 1));
  return max_of(value, ptx::shfl_bfly_f32(value, 2));
}
DEVICE float quad_sum(float value) {
  value += ptx::shfl_bfly_f32(value, 1);
  return value + ptx::shfl_bfly_f32(value, 2);
}

// Natural logarithm of a row's denominator, -inf without any key.
DEVICE float lse_of(float max, float total) {
  return total == 0.0f ? NEGATIVE_INFINITY : max + ptx::lg2_approx_ftz_f32(total) * LN2;
}

// What is subtracted from a row's logits. Without any key it is 0: -inf - -inf would be NaN, and 2^-inf is the 0 wanted.
DEVICE float shift_of(float max) { return max == NEGATIVE_INFINITY ? 0.0f : max; }

struct OnlineSoftmax {
  float max[ROWS_PER_LANE];  // of the row, the same in all four lanes
  float sum[ROWS_PER_LANE];  // of this lane's columns only; quad_sum gives the row's

  DEVICE void reset() {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) max[r] = NEGATIVE_INFINITY, sum[r] = 0.0f;
  }

  // Takes a tile of logits rS[16, KEYS], leaves its unnormalised probabilities packed in rP and rescales rO[16, WIDTH] to the
  // new maximum. Exponentials in base 2 of differences: a mask at the lowest finite f32 stays finite, as it would not if
  // logits were brought to base 2 first. A NaN logit makes its row NaN. Warp-collective.
  template <class Element, int WIDTH, int KEYS>
  DEVICE void step(float (&rS)[KEYS / 8][4], uint32_t (&rP)[KEYS / 8][2], float (&rO)[WIDTH / 8][4]) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      float tile_max = max[r];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) tile_max = max_of(max_of(rS[n][2 * r], rS[n][2 * r + 1]), tile_max);
      tile_max = quad_max(tile_max);
      const float shift = shift_of(tile_max);
      const float correction = ptx::ex2_approx_ftz_f32((max[r] - shift) * LOG2E);
      max[r] = tile_max;
      sum[r] *= correction;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n++) rO[n][2 * r] *= correction, rO[n][2 * r + 1] *= correction;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
        const float low = ptx::ex2_approx_ftz_f32((rS[n][2 * r] - shift) * LOG2E);
        const float high = ptx::ex2_approx_ftz_f32((rS[n][2 * r + 1] - shift) * LOG2E);
        sum[r] += low + high;
        rP[n][r] = Element::pack(low, high);
      }
    }
  }

  // The same but for rO, which a product may be adding to meanwhile: it is to be multiplied by `correction` afterwards. The
  // tile is logits / `scale`, a positive number, so that plain products need no pass of their own; its exponentials, in f32, take
  // their place. With `subtract` the maximum is subtracted before logits are brought to base 2, as above, in a pass of its
  // own: for logits that come near the end of f32. Warp-collective.
  template <int KEYS>
  DEVICE void exponentials(float (&rS)[KEYS / 8][4], float scale, bool subtract, float (&correction)[ROWS_PER_LANE]) {
    float shift[ROWS_PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      float tile_max = NEGATIVE_INFINITY;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
        tile_max = ptx::max_f32(ptx::max_f32(rS[n][2 * r], rS[n][2 * r + 1]), tile_max);
      }
      tile_max = max_of(quad_max(tile_max) * scale, max[r]);
      shift[r] = shift_of(tile_max);
      correction[r] = ptx::ex2_approx_ftz_f32((max[r] - shift[r]) * LOG2E);
      max[r] = tile_max;
      sum[r] *= correction[r];
    }
    if (subtract) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) rS[n][i] -= shift[i / 2];
      }
#pragma unroll
      for (int r = 0; r < ROWS_PER_LANE; r++) shift[r] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        rS[n][i] = ptx::ex2_approx_ftz_f32(ptx::fma_rn_f32(rS[n][i], scale * LOG2E, -shift[i / 2] * LOG2E));
        sum[i / 2] += rS[n][i];
      }
    }
  }
};
