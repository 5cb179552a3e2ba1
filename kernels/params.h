// The block of parameters that crosses from the host to a forward kernel; src/plan/params.rs is its twin, and the build
// asserts every offset on both sides. Strides are in elements, 0 along broadcast dimensions, 64-bit throughout.
#pragma once
#include <cstdint>

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
