// Walks the tiles of keys that a block of queries has to see: all branches, their segments, BLOCK_KV keys at a time.
// Everything in it is the same for all threads of the block.
#pragma once
#include "branch.cuh"
#include "mask.cuh"

// One block's queries: rows [first, first + rows) of head h of batch entry b; rows past seq_q count as there.
struct QueryBlock {
  int b, h, first, rows;
};

template <int BLOCK_KV>
struct KvCursor {
  int branch = -1, segment = 0;
  int kv = 0, end = 0;  // first key of the tile; where the block's keys of this segment end
  int key_len = 0;
  float gate = 0.0f;

  DEVICE bool done(const ForwardParams& p) const { return branch >= p.branches; }

  // To the first tile, from the state above.
  DEVICE void start(const ForwardParams& p, const QueryBlock& block) { next_segment(p, block); }

  DEVICE void advance(const ForwardParams& p, const QueryBlock& block) {
    kv += BLOCK_KV;
    if (kv >= end) next_segment(p, block);
  }

  // Whether every query of the block may attend to every key of the tile.
  DEVICE bool open(const ForwardParams& p, const QueryBlock& block) const {
    const SegmentParams& s = p.segment[segment];
    const KeyRange first = keys_of_row(s, p.seq_q, block.first, key_len);
    const KeyRange last = keys_of_row(s, p.seq_q, block.first + block.rows - 1, key_len);
    return last.begin <= kv && kv + BLOCK_KV <= first.end;
  }

 private:
  // The next segment with a key for the block. A branch whose gate is 0 is passed over, unless its lse is wanted.
  DEVICE void next_segment(const ForwardParams& p, const QueryBlock& block) {
    segment++;
    while (!done(p)) {
      if (branch < 0 || segment >= p.branch[branch].end_segment) {
        branch++;
        if (done(p)) return;
        gate = gate_of(p.branch[branch], block.b, block.h);
        segment = gate == 0.0f && p.lse == nullptr ? p.branch[branch].end_segment : p.branch[branch].first_segment;
        continue;
      }
      const SegmentParams& s = p.segment[segment];
      key_len = key_len_of(s, block.b);
      kv = keys_of_row(s, p.seq_q, block.first, key_len).begin;
      end = keys_of_row(s, p.seq_q, min_of(block.first + block.rows, p.seq_q) - 1, key_len).end;
      if (kv < end) return;
      segment++;
    }
  }
};
