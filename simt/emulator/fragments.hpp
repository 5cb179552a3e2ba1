// The one map between a warp's registers and the elements of a matrix ("Matrix Fragments for mma.m16n8k16", PTX ISA).
//
// A tile of 8 rows by 8 columns is spread over the warp in pairs: lane l holds row l/4, columns 2(l%4) and 2(l%4)+1.
// A larger matrix is a stack of such tiles: pair i of a lane lies in tile i, tiles counted down the rows first.
//
//   A [16, k]   two tiles down   pair i = register i (two halves)      mma.m16n8k8: i < 2, mma.m16n8k16: i < 4
//   B [k, 8]    as its transpose [8, k], one tile down:  pair i = register i
//   C [16, 8]   two tiles down   pair i = accumulators 2i and 2i+1
//   ldmatrix    one tile per register; .trans hands out the transpose of the tile
#pragma once

namespace simt {

struct Place {
  int row, column;  // of the pair's first element; the second is one column on
};

constexpr Place pair_place(int lane, int pair, int tiles_down) {
  return {lane / 4 + 8 * (pair % tiles_down), lane % 4 * 2 + 8 * (pair / tiles_down)};
}

constexpr int TILES_DOWN_A = 2, TILES_DOWN_B = 1, TILES_DOWN_C = 2;

}  // namespace simt
