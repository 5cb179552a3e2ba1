// The blocks of parameters that cross from the host to a kernel; src/plan/params.rs is their twin, and the build
// asserts every offset on both sides. Strides are in elements, 0 along broadcast dimensions, 64-bit throughout.
#pragma once
#include <cstdint>

#include "ptx/contract.h"

constexpr int MAX_BRANCHES = 32;
constexpr int MAX_SEGMENTS = 32;

// Values of SegmentParams::causal.
constexpr int32_t CAUSAL_NONE = 0;          // every key
constexpr int32_t CAUSAL_TOP_LEFT = 1;      // j <= i
constexpr int32_t CAUSAL_BOTTOM_RIGHT = 2;  // j <= i + seq_kv - seq_q

// Values of SegmentParams::bias_type.
constexpr int32_t BIAS_NONE = 0;
constexpr int32_t BIAS_F32 = 1;
constexpr int32_t BIAS_F16 = 2;
constexpr int32_t BIAS_BF16 = 3;
constexpr int32_t BIAS_BOOL = 4;  // one byte; not 0 where the query may attend

struct SegmentParams {
  const void* k;            // [batch, seq_kv, kv_heads, head_dim], rows 16-byte aligned, never null unless seq_kv is 0
  const void* v;            // [batch, seq_kv, kv_heads, value_dim], rows 16-byte aligned, likewise
  const void* bias;         // [batch, heads, seq_q, seq_kv], any alignment; null with BIAS_NONE
  const uint32_t* key_len;  // [batch], at most seq_kv; null: seq_kv
  int64_t k_stride[3];      // batch, seq, head
  int64_t v_stride[3];      // batch, seq, head
  int64_t bias_stride[4];   // batch, head, query, key
  int64_t key_len_stride;   // batch
  int32_t seq_kv;
  int32_t group;         // query heads per head of keys
  int32_t causal;        // CAUSAL_…
  int32_t window_left;   // keys left of i + seq_kv - seq_q; -1 open
  int32_t window_right;  // keys right of it; -1 open
  int32_t bias_type;     // BIAS_…
};

struct BranchParams {
  const float* gate;         // [batch, heads]; null: gate_value
  const float* region;       // [batch, heads, seq_q]; null: 1
  int64_t gate_stride[2];    // batch, head
  int64_t region_stride[3];  // batch, head, query
  float gate_value;
  int32_t first_segment;
  int32_t end_segment;
  int32_t reserved;  // keeps the size a multiple of 8
};

struct ForwardParams {
  const void* q;          // [batch, seq_q, heads, head_dim], rows 16-byte aligned
  void* out;              // [batch, seq_q, heads, value_dim], rows 16-byte aligned
  float* lse;             // [branches, batch, heads, seq_q]; null: not wanted
  int64_t q_stride[3];    // batch, seq, head
  int64_t out_stride[3];  // batch, seq, head
  int64_t lse_stride[4];  // branch, batch, head, query
  int32_t batch;
  int32_t heads;
  int32_t seq_q;
  int32_t head_dim;   // a multiple of 8
  int32_t value_dim;  // a multiple of 8
  int32_t head_blocks;  // blocks that share the queries of one head
  int32_t branches;
  int32_t accumulate;   // not 0: add to what out holds
  float softmax_scale;  // factor of every product
  float softcap;        // 0: none
  BranchParams branch[MAX_BRANCHES];
  SegmentParams segment[MAX_SEGMENTS];
};

// Segments of one launch of a kernel that copies by tensor maps.
constexpr int MAX_MAPPED_SEGMENTS = 8;

// For kernels that copy tiles by tensor maps. Each map is of four dimensions: the row's elements, sequence, head, batch; an
// extent along which the tensor broadcasts is 1 there. A map of a segment without keys is all zeros.
struct MappedForwardParams {
  ptx::TensorMap q;                       // boxes of 64 columns and 64 rows
  ptx::TensorMap k[MAX_MAPPED_SEGMENTS];  // boxes of 64 columns and a tile's keys, 16 where all stay in shared memory
  ptx::TensorMap v[MAX_MAPPED_SEGMENTS];  // likewise
  ptx::TensorMap out;                     // boxes of 64 columns and 16 rows; all zeros for kernels that store plainly
  ForwardParams forward;
  uint64_t reserved[6];  // keeps the size a multiple of 64
};

// Where a kernel writes rows of a gradient: the gradient itself, or the parts of it that are still to be added up.
struct GradientRows {
  void* to;           // null: not wanted
  int64_t stride[4];  // part, batch, seq, head
  int32_t f32;        // not 0: elements are f32; 0: of the type of q
  int32_t reserved;
};

struct SegmentGradients {
  GradientRows dk;         // [key_batch, seq_kv, kv_heads, head_dim], rows 16-byte aligned
  GradientRows dv;         // [key_batch, seq_kv, kv_heads, value_dim], likewise
  float* dbias;            // [bias_extent], of each part; null: not wanted
  int64_t dbias_stride[5];  // part, batch, head, query, key; 0 along extents of 1
  int32_t bias_extent[4];   // batch, heads, seq_q and seq_kv, or 1 where the bias broadcasts
  int32_t bias_blocks;      // of the launch that computes dbias
  int32_t bias_parts;       // blocks that share a tile of the bias, each with its part of the sum
  int32_t key_blocks;       // of the launch that computes dk and dv
  int32_t key_parts;        // blocks that share a tile of keys, each with its part of the sum
  int32_t key_batch;        // batch entries that the keys' tiles are counted in: batch, or 1 where keys and values broadcast
  int32_t reserved;
};

struct BackwardParams {
  ForwardParams forward;   // as the forward had it; out and lse are what it left, or null
  const void* dout;        // [batch, seq_q, heads, value_dim], rows 16-byte aligned
  int64_t dout_stride[3];  // batch, seq, head
  GradientRows dq;         // [batch, seq_q, heads, head_dim], rows 16-byte aligned
  float* statistics;       // [3, branches, batch, heads, seq_q], dense: see tile/statistics.cuh; null: not wanted
  uint32_t branches;       // bit n: something of branch n is wanted
  uint32_t g_branches;     // bit n: its g is wanted, even where its gate is 0
  SegmentGradients segment[MAX_SEGMENTS];
};

constexpr int MAX_SUMS = 32;

// One sum over parts: to[n] = Σ_t parts[n, t] · factor[n, t], for every index n below `extent` and t below `terms`.
struct SumParams {
  const float* parts;
  const float* factor;  // null: factor_value
  void* to;
  int64_t parts_stride[4];
  int64_t parts_term_stride[3];
  int64_t factor_stride[4];
  int64_t factor_term_stride[3];
  int64_t to_stride[4];
  int32_t extent[4];
  int32_t terms[3];
  float factor_value;
  int32_t f32;       // not 0: results are f32; 0: of the type of q
  int32_t together;  // not 0: the threads of a block share the last of the terms; 0: each has a sum of its own
  int32_t blocks;
  int32_t reserved;
};

struct ReduceParams {
  SumParams sum[MAX_SUMS];  // those past the last have no block
};
