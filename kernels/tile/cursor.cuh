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
  DEVICE void start(const ForwardParams& p, const QueryBlock& block, const BranchSet& branches) {
    next_segment(p, block, branches);
  }

  // Returns whether that is another segment's, or none.
  DEVICE bool advance(const ForwardParams& p, const QueryBlock& block, const BranchSet& branches) {
    kv += BLOCK_KV;
    if (kv < end) return false;
    next_segment(p, block, branches);
    return true;
  }

  // Whether every query of the block may attend to every key of the tile.
  DEVICE bool open(const ForwardParams& p, const QueryBlock& block) const {
    return all_attend(p.segment[segment], p.seq_q, block.first, block.rows, kv, BLOCK_KV, key_len);
  }

 private:
  // The next segment with a key for the block.
  DEVICE void next_segment(const ForwardParams& p, const QueryBlock& block, const BranchSet& branches) {
    segment++;
    while (!done(p)) {
      if (branch < 0 || segment >= p.branch[branch].end_segment) {
        branch++;
        if (done(p)) return;
        gate = gate_of(p.branch[branch], block.b, block.h);
        segment = branches.has(branch, gate) ? p.branch[branch].first_segment : p.branch[branch].end_segment;
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
