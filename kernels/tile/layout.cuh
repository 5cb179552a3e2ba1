// The one map of fragments: which element of a tile a register of a lane holds.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
#pragma once
#include "device.cuh"

constexpr int WARP = 32;

DEVICE int lane_id() { return threadIdx.x % WARP; }
DEVICE int warp_id() { return threadIdx.x / WARP; }

// C, the accumulator of m16n8: register i of a lane holds (row, column) of a 16x8 tile. A lane has two rows, 8 apart, and
// two adjacent columns of each; four adjacent lanes (a quad) share a row.
DEVICE int fragment_row(int i) { return lane_id() / 4 + i / 2 * 8; }
DEVICE int fragment_column(int i) { return lane_id() % 4 * 2 + i % 2; }

// A of m16n8k16 is two such tiles side by side, each pair of adjacent columns packed into one register: registers 0, 1 are
// rows g, g+8 of the left tile, 2, 3 those of the right one. So two accumulators of m16n8, packed, are an A operand.

constexpr int ROWS_PER_LANE = 2;
