// Walks the tiles of queries that a block of keys has to see: those of every head of the group, and of every batch entry
// where keys and values broadcast, BLOCK_Q queries at a time. Everything in it is the same for all threads of the block.
#pragma once
#include "branch.cuh"
#include "mask.cuh"

// One block's keys: [kv, kv + 64) of a segment's head, and which of the queries that see them.
struct KeyBlock {
  int segment, branch;
  int b, head, kv;
  int part, parts;
};

template <int BLOCK_Q, int BLOCK_KV>
struct QueryCursor {
  int unit = 0, units = 0;  // tiles of all queries that share the keys
  int b = 0, h = 0, row = 0;
  int key_len = 0;
  float gate = 0.0f;

  DEVICE bool done() const { return unit >= units; }

  // To the first tile of the block's part.
  DEVICE void start(const BackwardParams& p, const KeyBlock& keys) {
    const ForwardParams& f = p.forward;
    const int batches = p.segment[keys.segment].key_batch == 1 ? f.batch : 1;
    units = batches * f.segment[keys.segment].group * tiles(f);
    unit = keys.part;
    seek(p, keys);
  }

  DEVICE void advance(const BackwardParams& p, const KeyBlock& keys) {
    unit += keys.parts;
    seek(p, keys);
  }

 private:
  static DEVICE int tiles(const ForwardParams& f) { return (f.seq_q + BLOCK_Q - 1) / BLOCK_Q; }

  // From `unit` on, to a tile with a query that may attend to a key of the block. Heads whose gate is 0 are passed over.
  DEVICE void seek(const BackwardParams& p, const KeyBlock& keys) {
    const ForwardParams& f = p.forward;
    const SegmentParams& s = f.segment[keys.segment];
    for (; unit < units; unit += keys.parts) {
      const int before = unit / tiles(f);
      row = unit % tiles(f) * BLOCK_Q;
      h = keys.head * s.group + before % s.group;
      b = keys.b + before / s.group;
      gate = gate_of(f.branch[keys.branch], b, h);
      if (gate == 0.0f) continue;
      key_len = key_len_of(s, b);
      const int begin = keys_of_row(s, f.seq_q, row, key_len).begin;
      const int end = keys_of_row(s, f.seq_q, min_of(row + BLOCK_Q, f.seq_q) - 1, key_len).end;
      if (begin < keys.kv + BLOCK_KV && keys.kv < end) return;
    }
  }
};
