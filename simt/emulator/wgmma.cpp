// One warp multiplies its 16 of the 64 rows. Issuing takes the accumulators away (the kernel's registers are poisoned)
// and holds the shared operands; waiting executes what has been committed, reads the operands then, and gives the
// accumulators back.
#include "wgmma.hpp"

#include <algorithm>
#include <cstring>

#include "../../kernels/ptx/contract.h"
#include "descriptor.hpp"
#include "fragments.hpp"
#include "half.hpp"
#include "memory.hpp"
#include "scheduler.hpp"

namespace simt {
namespace {

constexpr int ROWS = WgmmaTiles::ROWS, MAX_COLUMNS = WgmmaTiles::MAX_COLUMNS, K = WgmmaTiles::K;
constexpr uint32_t CHUNK = 16;                  // bytes that the swizzle keeps together
constexpr int PER_CHUNK = 8;

struct WgmmaLane {
  AccumulatorRegisters d;
  int columns;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};
struct Nothing {};

uint32_t first_row(const Warp& warp) { return uint32_t(warp.id % 4 * ROWS); }

// Every 16-byte chunk of shared memory that this warp's part of the instruction reads.
template <class Visit>
void for_each_chunk(const WgmmaOperation& op, const Warp& warp, Visit visit) {
  const Descriptor a{op.a_descriptor}, b{op.b_descriptor};
  auto chunk = [&](uint32_t address) { visit(shared_offset(address, CHUNK, "wgmma", op.pc)); };
  if (!op.a_in_registers)
    for (int row = 0; row < ROWS; row++)
      for (int k = 0; k < K; k += PER_CHUNK) chunk(a.element(Major::K, first_row(warp) + uint32_t(row), uint32_t(k)));
  if (op.a_in_registers)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < op.columns; n += PER_CHUNK) chunk(b.element(Major::MN, uint32_t(n), uint32_t(k)));
  else
    for (int n = 0; n < op.columns; n++)
      for (int k = 0; k < K; k += PER_CHUNK) chunk(b.element(Major::K, uint32_t(n), uint32_t(k)));
}

float widen(const WgmmaOperation& op, uint16_t bits) { return op.bf16 ? f32_of_bf16(bits) : f32_of_f16(bits); }

// The elements of a chunk, `step` apart.
void widen_chunk(const WgmmaOperation& op, uint32_t address, float* to, int step) {
  uint16_t bits[PER_CHUNK];
  memcpy(bits, block->shared + (address - SHARED_BASE), CHUNK);
  for (int i = 0; i < PER_CHUNK; i++) to[i * step] = widen(op, bits[i]);
}

SIMT_WIDE void multiply(WgmmaTiles& tiles, int columns) {
  for (int row = 0; row < ROWS; row++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < columns; n++) tiles.c[row][n] += tiles.a[row][k] * tiles.b[k][n];
}

void execute(Warp& warp, const WgmmaOperation& op) {
  auto& [a, b, c] = block->wgmma_tiles;
  const Descriptor a_descriptor{op.a_descriptor}, b_descriptor{op.b_descriptor};
  for (int row = 0; row < ROWS && !op.a_in_registers; row++)
    for (int k = 0; k < K; k += PER_CHUNK)
      widen_chunk(op, a_descriptor.element(Major::K, first_row(warp) + uint32_t(row), uint32_t(k)), &a[row][k], 1);
  for (int lane = 0; lane < LANES && op.a_in_registers; lane++)
    for (int pair = 0; pair < 4; pair++) {
      const Place p = pair_place(lane, pair, TILES_DOWN_A);
      a[p.row][p.column] = widen(op, uint16_t(op.a[lane][pair]));
      a[p.row][p.column + 1] = widen(op, uint16_t(op.a[lane][pair] >> 16));
    }
  if (op.a_in_registers)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < op.columns; n += PER_CHUNK)
        widen_chunk(op, b_descriptor.element(Major::MN, uint32_t(n), uint32_t(k)), &b[k][n], 1);
  else
    for (int n = 0; n < op.columns; n++)
      for (int k = 0; k < K; k += PER_CHUNK)
        widen_chunk(op, b_descriptor.element(Major::K, uint32_t(n), uint32_t(k)), &b[k][n], MAX_COLUMNS);

  // The accumulator is a row of tiles as mma has them, four registers each.
  WgmmaAccumulator& accumulator = warp.wgmma.accumulators[op.accumulator];
  auto for_each_pair = [&](auto visit) {
    for (int lane = 0; lane < LANES; lane++)
      for (int pair = 0; pair < op.columns / 4; pair++) {
        const Place p = pair_place(lane, pair, TILES_DOWN_C);
        visit(&accumulator.values[lane][2 * pair], &c[p.row][p.column]);
      }
  };
  if (op.accumulate) for_each_pair([](float* lane, float* tile) { memcpy(tile, lane, 8); });
  else memset(c, 0, sizeof c);
  multiply(block->wgmma_tiles, op.columns);
  for_each_pair([](float* lane, float* tile) { memcpy(lane, tile, 8); });
  block->stats.wgmma++;
}

void guard(Warp& warp, int lane, const void* registers, size_t bytes, bool written, Pc pc) {
  block->threads[warp.id * LANES + lane].guarded.push_back({static_cast<const char*>(registers), bytes, written, pc});
}

// The accumulator's values come here, unless an earlier operation in flight has brought them.
size_t take_accumulator(Warp& warp, WgmmaLane* const (&lanes)[LANES]) {
  std::vector<WgmmaAccumulator>& all = warp.wgmma.accumulators;
  const int count = lanes[0]->columns / 2;
  auto in_use = [&](const WgmmaAccumulator& a) {
    return a.operations && a.count == count && a.registers[0].at(0) == lanes[0]->d.at(0);
  };
  auto found = std::find_if(all.begin(), all.end(), in_use);
  if (found == all.end()) {
    found = std::find_if(all.begin(), all.end(), [](const WgmmaAccumulator& a) { return a.operations == 0; });
    if (found == all.end()) found = all.emplace(all.end());
    found->count = count;
    for (int lane = 0; lane < LANES; lane++) {
      const AccumulatorRegisters& registers = found->registers[lane] = lanes[lane]->d;
      for (int i = 0; i < count; i++) {
        found->values[lane][i] = *registers.at(i);
        poison(reinterpret_cast<char*>(registers.at(i)), sizeof(float));
      }
    }
  }
  found->operations++;
  return size_t(found - all.begin());
}

// The registers of the instructions still in flight, and nothing else, stay guarded.
void guard_again(Warp& warp, const std::vector<WgmmaOperation>& retired) {
  std::vector<WgmmaAccumulator>& all = warp.wgmma.accumulators;
  for (const WgmmaOperation& op : retired) {
    WgmmaAccumulator& accumulator = all[op.accumulator];
    const bool last = --accumulator.operations == 0;
    for (int lane = 0; lane < LANES; lane++) {
      std::vector<GuardedRegisters>& guarded = block->threads[warp.id * LANES + lane].guarded;
      // Operations retire in the order of their issue, each with the guards that it brought.
      guarded.erase(guarded.begin(), guarded.begin() + op.guards);
      for (int i = 0; last && i < accumulator.count; i++) *accumulator.registers[lane].at(i) = accumulator.values[lane][i];
    }
  }
}

void check_operands(const WgmmaOperation& op) {
  for (uint64_t bits : {op.a_in_registers ? op.b_descriptor : op.a_descriptor, op.b_descriptor}) {
    const Descriptor descriptor{bits};
    if (!descriptor.swizzles_128())
      fail(SIMT_UNSUPPORTED, "wgmma with another swizzle than that of 128 bytes (", at(op.pc), ")");
    if (!descriptor.tile_aligned())
      fail(SIMT_MISALIGNED, "operand of wgmma whose tile is not aligned to 1024 bytes (", at(op.pc), ")");
  }
}

void issue(Op kind, bool bf16, WgmmaLane mine, Pc pc) {
  collective(kind, pc, mine, [&](Warp& warp, auto& lanes) {
    for (const WgmmaLane* lane : lanes)
      if (lane->a_descriptor != mine.a_descriptor || lane->b_descriptor != mine.b_descriptor ||
          lane->accumulate != mine.accumulate || lane->columns != mine.columns)
        fail(SIMT_DIVERGENCE, "lanes of one warp give wgmma different descriptors (", at(pc), ")");
    if (!warp.wgmma.fenced)
      fail(SIMT_WGMMA, "wgmma.mma_async (", at(pc), ") without a wgmma.fence since the registers were last the warp's");
    WgmmaOperation op{};
    op.a_descriptor = mine.a_descriptor;
    op.b_descriptor = mine.b_descriptor;
    op.columns = mine.columns;
    op.a_in_registers = mine.a != nullptr;
    op.bf16 = bf16;
    op.accumulate = mine.accumulate;
    op.pc = pc;
    check_operands(op);
    uint64_t good = NO_WRITE;
    for_each_chunk(op, warp, [&](uint32_t offset) {
      if (block->launch->checked()) block->shadow.hold(warp, offset, CHUNK, pc, good);
    });
    op.accumulator = take_accumulator(warp, lanes);
    // Registers of an interpreted program are no memory that could be guarded.
    const bool guards = mine.d.slots == nullptr;
    op.guards = !guards ? 0 : op.a_in_registers ? 2 : 1;
    for (int lane = 0; lane < LANES; lane++) {
      const size_t bytes = size_t(mine.columns) / 2 * sizeof(float);
      if (guards) guard(warp, lane, lanes[lane]->d.at(0), bytes, true, pc);
      if (!op.a_in_registers) continue;
      memcpy(op.a[lane], lanes[lane]->a, sizeof op.a[lane]);
      if (guards) guard(warp, lane, lanes[lane]->a, sizeof op.a[lane], false, pc);
    }
    warp.wgmma.open.push_back(op);
  });
}

}  // namespace

void wgmma_wait_group(int groups_left) {
  const Pc pc = SIMT_CALLER;
  if (dropped("wgmma.wait_group", pc)) return;
  Nothing mine;
  collective(Op::WgmmaWaitGroup, pc, mine, [&](Warp& warp, auto&) {
    WgmmaQueue& queue = warp.wgmma;
    if (groups_left == 0 && !queue.open.empty())
      fail(SIMT_WGMMA, "wgmma.wait_group 0 (", at(pc), ") does not wait for the wgmma issued at (",
           at(queue.open[0].pc), "), which was never committed");
    while (int(queue.groups.size()) > groups_left) {
      const std::vector<WgmmaOperation> group = std::move(queue.groups.front());
      queue.groups.erase(queue.groups.begin());
      for (const WgmmaOperation& op : group) {
        execute(warp, op);
        for_each_chunk(op, warp, [&](uint32_t offset) {
          if (block->launch->checked()) block->shadow.let_go(warp, offset, CHUNK, op.pc);
        });
      }
      guard_again(warp, group);
    }
    queue.fenced = false;  // what comes back may now be touched, and the next wgmma needs to be told
  });
}

void issue_wgmma(bool bf16, AccumulatorRegisters d, int columns, const uint32_t* a, uint64_t a_descriptor,
                 uint64_t b_descriptor, bool accumulate, Pc pc) {
  const Op kind = a ? (bf16 ? Op::WgmmaRegistersBf16 : Op::WgmmaRegistersF16)
                    : (bf16 ? Op::WgmmaSharedBf16 : Op::WgmmaSharedF16);
  issue(kind, bf16, {d, columns, a, a_descriptor, b_descriptor, accumulate}, pc);
}

void wgmma(bool bf16, float* d, int tiles, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool accumulate) {
  const AccumulatorRegisters registers{reinterpret_cast<char*>(d), nullptr};
  issue_wgmma(bf16, registers, 8 * tiles, a, a_descriptor, b_descriptor, accumulate, SIMT_CALLER);
}

void check_guarded(const std::vector<GuardedRegisters>& guarded, const char* p, size_t bytes, bool write, Pc pc) {
  for (const GuardedRegisters& g : guarded) {
    if (p + bytes <= g.begin || p >= g.begin + g.bytes || (!write && !g.written)) continue;
    fail(SIMT_WGMMA, write ? "write" : "read", " of ", g.written ? "an accumulator" : "an A operand", " (", at(pc),
         ") while the wgmma issued at (", at(g.pc), ") is in flight");
  }
}

void check_exit(const WgmmaQueue& queue) {
  for (const std::vector<WgmmaOperation>& group : queue.groups)
    for (const WgmmaOperation& op : group)
      fail(SIMT_WGMMA, "the thread exits while the wgmma issued at (", at(op.pc), ") is in flight");
  for (const WgmmaOperation& op : queue.open)
    fail(SIMT_WGMMA, "the thread exits while the wgmma issued at (", at(op.pc), ") is in flight, never committed");
}

}  // namespace simt

namespace ptx {

using namespace simt;

void wgmma_fence() {
  const Pc pc = SIMT_CALLER;
  if (dropped("wgmma.fence", pc)) return;
  Nothing mine;
  collective(Op::WgmmaFence, pc, mine, [](Warp& warp, auto&) { warp.wgmma.fenced = true; });
}

void wgmma_commit_group() {
  const Pc pc = SIMT_CALLER;
  if (dropped("wgmma.commit_group", pc)) return;
  Nothing mine;
  collective(Op::WgmmaCommitGroup, pc, mine, [](Warp& warp, auto&) {
    warp.wgmma.groups.push_back(std::move(warp.wgmma.open));
    warp.wgmma.open.clear();
  });
}

}  // namespace ptx
