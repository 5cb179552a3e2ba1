// ldmatrix and mma: the last lane to arrive does the work of the warp.
#include "../../kernels/ptx/contract.h"
#include "fragments.hpp"
#include "half.hpp"
#include "memory.hpp"
#include "scheduler.hpp"

namespace simt {
namespace {

template <int Matrices>
struct LdmatrixLane {
  uint32_t* registers;
  uint32_t address;
};

template <int Matrices, bool Transposed>
void ldmatrix(Op op, uint32_t (&r)[Matrices], uint32_t row_address, Pc pc) {
  LdmatrixLane<Matrices> mine{r, row_address};
  collective(op, pc, mine, [&](Warp& warp, auto& lanes) {
    for (int m = 0; m < Matrices; m++) {
      uint32_t offsets[8];
      const uint16_t* rows[8];
      for (int j = 0; j < 8; j++) {
        const uint32_t address = lanes[m * 8 + j]->address;
        if (address % 16) fail(SIMT_MISALIGNED, "row address of ldmatrix not aligned to 16 bytes (", at(pc), ")");
        offsets[j] = shared_offset(address, 16, "ldmatrix", pc);
        rows[j] = reinterpret_cast<const uint16_t*>(block->shared + offsets[j]);
        if (block->launch->checked()) block->shadow.read_by_warp(warp, offsets[j], 16, pc);
      }
      block->stats.ldmatrix_phases++;
      block->stats.ldmatrix_conflicts += bank_conflicts(offsets, 8, 16);
      for (int lane = 0; lane < LANES; lane++) {
        const Place p = pair_place(lane, 0, 1);
        const uint16_t low = Transposed ? rows[p.column][p.row] : rows[p.row][p.column];
        const uint16_t high = Transposed ? rows[p.column + 1][p.row] : rows[p.row][p.column + 1];
        lanes[lane]->registers[m] = uint32_t(low) | uint32_t(high) << 16;
      }
    }
  });
}

struct MmaLane {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// d[16,8] += a[16,K] · b[K,8]; halves are widened once, then it is a matrix product over f32.
template <class Element, int K>
inline __attribute__((always_inline)) void multiply(MmaLane* const (&lanes)[LANES]) {
  alignas(32) uint16_t a_bits[16 * K], b_bits[K * 8];
  alignas(32) float a[16 * K], b[K * 8], c[16 * 8];
  for (int lane = 0; lane < LANES; lane++) {
    const MmaLane& from = *lanes[lane];
    for (int pair = 0; pair < K / 4; pair++) {
      const Place p = pair_place(lane, pair, TILES_DOWN_A);
      memcpy(&a_bits[p.row * K + p.column], &from.a[pair], 4);  // little endian: the lower half is the first column
    }
    for (int pair = 0; pair < K / 8; pair++) {
      const Place p = pair_place(lane, pair, TILES_DOWN_B);  // of the transpose: row is n, column is k
      b_bits[p.column * 8 + p.row] = uint16_t(from.b[pair]);
      b_bits[(p.column + 1) * 8 + p.row] = uint16_t(from.b[pair] >> 16);
    }
    for (int pair = 0; pair < 2; pair++) {
      const Place p = pair_place(lane, pair, TILES_DOWN_C);
      memcpy(&c[p.row * 8 + p.column], &from.d[2 * pair], 8);
    }
  }
  for (int i = 0; i < 16 * K; i++) a[i] = Element::widen(a_bits[i]);
  for (int i = 0; i < K * 8; i++) b[i] = Element::widen(b_bits[i]);
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) c[row * 8 + n] += a[row * K + k] * b[k * 8 + n];
  for (int lane = 0; lane < LANES; lane++)
    for (int pair = 0; pair < 2; pair++) {
      const Place p = pair_place(lane, pair, TILES_DOWN_C);
      memcpy(&lanes[lane]->d[2 * pair], &c[p.row * 8 + p.column], 8);
    }
}

SIMT_WIDE void multiply_k16_f16(MmaLane* const (&lanes)[LANES]) { multiply<F16Element, 16>(lanes); }
SIMT_WIDE void multiply_k16_bf16(MmaLane* const (&lanes)[LANES]) { multiply<Bf16Element, 16>(lanes); }
SIMT_WIDE void multiply_k8_f16(MmaLane* const (&lanes)[LANES]) { multiply<F16Element, 8>(lanes); }
SIMT_WIDE void multiply_k8_bf16(MmaLane* const (&lanes)[LANES]) { multiply<Bf16Element, 8>(lanes); }

void mma(Op op, void (*product)(MmaLane* const (&)[LANES]), MmaLane mine, Pc pc) {
  collective(op, pc, mine, [&](Warp&, auto& lanes) {
    product(lanes);
    block->stats.mma++;
  });
}

}  // namespace
}  // namespace simt

namespace ptx {

using namespace simt;

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  ldmatrix<4, false>(Op::LdmatrixX4, r, row_address, SIMT_CALLER);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
  ldmatrix<4, true>(Op::LdmatrixX4Trans, r, row_address, SIMT_CALLER);
}
void ldmatrix_x2(uint32_t (&r)[2], uint32_t row_address) {
  ldmatrix<2, false>(Op::LdmatrixX2, r, row_address, SIMT_CALLER);
}
void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row_address) {
  ldmatrix<2, true>(Op::LdmatrixX2Trans, r, row_address, SIMT_CALLER);
}

void mma_m16n8k16(F16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(Op::MmaK16F16, &multiply_k16_f16, {d, a, {b0, b1}}, SIMT_CALLER);
}
void mma_m16n8k16(BF16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(Op::MmaK16Bf16, &multiply_k16_bf16, {d, a, {b0, b1}}, SIMT_CALLER);
}
void mma_m16n8k8(F16, float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma(Op::MmaK8F16, &multiply_k8_f16, {d, a, {b, 0}}, SIMT_CALLER);
}
void mma_m16n8k8(BF16, float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma(Op::MmaK8Bf16, &multiply_k8_bf16, {d, a, {b, 0}}, SIMT_CALLER);
}

}  // namespace ptx
