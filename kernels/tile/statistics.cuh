// What the backward needs of each query's softmax over one branch, and the two steps that use it:
//
//   P_ij = exp(S_ij - shift_i) · inverse_i        docs/math.md, equation 2
//   g_i  = Σ_j P_ij (dout_i · v_j)                equation 8
//
// Shift and inverse rather than their common logarithm: where logits are huge, as in a row whose every bias is the lowest
// f32, the logarithm of the number of keys is lost in f32.
#pragma once
#include "../params.h"
#include "mask.cuh"
#include "softmax.cuh"

struct Statistics {
  float shift, inverse, g;

  // Of a row without any key, or past the last.
  static DEVICE Statistics none() { return {0.0f, 0.0f, 0.0f}; }
};

// Where one of the three numbers of a query stands: shift, inverse, g.
DEVICE float* statistic(const BackwardParams& p, int which, int branch, int b, int h, int query) {
  const ForwardParams& f = p.forward;
  const int64_t row = ((int64_t(which) * f.branches + branch) * f.batch + b) * f.heads + h;
  return p.statistics + row * f.seq_q + query;
}

// By the first of the four lanes that share the row.
DEVICE void store_statistics(const BackwardParams& p, int branch, int b, int h, int query, const Statistics& row) {
  if (query >= p.forward.seq_q || lane_id() % 4 != 0) return;
  *statistic(p, 0, branch, b, h, query) = row.shift;
  *statistic(p, 1, branch, b, h, query) = row.inverse;
  *statistic(p, 2, branch, b, h, query) = row.g;
}

// Of the two rows of a lane, from the warp's first query on.
struct LaneStatistics {
  Statistics rows[ROWS_PER_LANE];

  DEVICE void load(const BackwardParams& p, int branch, int b, int h, int row) {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) {
      const int query = row + fragment_row(2 * r);
      rows[r] = Statistics::none();
      if (query >= p.forward.seq_q) continue;
      rows[r] = {*statistic(p, 0, branch, b, h, query), *statistic(p, 1, branch, b, h, query),
                 *statistic(p, 2, branch, b, h, query)};
    }
  }

  // Of the query that element i of tile n belongs to.
  DEVICE float shift(int, int i) const { return rows[i / 2].shift; }
  DEVICE float inverse(int, int i) const { return rows[i / 2].inverse; }
  DEVICE float g(int, int i) const { return rows[i / 2].g; }
};

// The same of tiles that are transposed: queries are columns, and their numbers lie in shared memory, QUERIES of each kind.
template <int QUERIES>
struct SharedStatistics {
  const float* sRows;

  DEVICE float shift(int n, int i) const { return sRows[n * 8 + fragment_column(i)]; }
  DEVICE float inverse(int n, int i) const { return sRows[QUERIES + n * 8 + fragment_column(i)]; }
  DEVICE float g(int n, int i) const { return sRows[2 * QUERIES + n * 8 + fragment_column(i)]; }
};

// rD: products dout · v -> (dout · v - g), the factor of P in equation 9 but for the branch's weight.
template <int COLUMNS, class Rows>
DEVICE void subtract_g(float (&rD)[COLUMNS / 8][4], const Rows& rows) {
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) rD[n][i] -= rows.g(n, i);
  }
}

// rD times the derivative of the cap (equation 10), rS being the capped products.
template <int COLUMNS>
DEVICE void multiply_slope(float (&rD)[COLUMNS / 8][4], const float (&rS)[COLUMNS / 8][4], const ForwardParams& p) {
  if (p.softcap == 0.0f) return;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float tanh = rS[n][i] / p.softcap;
      rD[n][i] *= 1.0f - tanh * tanh;
    }
  }
}

// rS: logits -> probabilities.
template <int COLUMNS, class Rows>
DEVICE void probabilities(float (&rS)[COLUMNS / 8][4], const Rows& rows) {
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      rS[n][i] = ptx::ex2_approx_ftz_f32((rS[n][i] - rows.shift(n, i)) * LOG2E) * rows.inverse(n, i);
    }
  }
}

// Softmax and g of two rows, tile by tile: equations 4 and 5, and the same for Σ_j exp(S_ij - m_i) (dout_i · v_j).
struct OnlineStatistics {
  float max[ROWS_PER_LANE];                         // of the row, the same in all four lanes
  float sum[ROWS_PER_LANE], product[ROWS_PER_LANE];  // of this lane's columns only

  DEVICE void reset() {
#pragma unroll
    for (int r = 0; r < ROWS_PER_LANE; r++) max[r] = NEGATIVE_INFINITY, sum[r] = product[r] = 0.0f;
  }

  // Takes a tile of logits and of products dout · v. Warp-collective.
  template <int KEYS>
  DEVICE void step(const float (&rS)[KEYS / 8][4], const float (&rD)[KEYS / 8][4]) {
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
      product[r] *= correction;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; i++) {
          const float e = ptx::ex2_approx_ftz_f32((rS[n][i] - shift) * LOG2E);
          sum[r] += e;
          product[r] += e * rD[n][i];
        }
      }
    }
  }

  // Warp-collective.
  DEVICE Statistics finish(int r) const {
    const float total = quad_sum(sum[r]), g = quad_sum(product[r]);
    if (total == 0.0f) return Statistics::none();
    return {shift_of(max[r]), 1.0f / total, g / total};
  }
};
