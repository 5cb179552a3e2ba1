// The instructions of kernels/ptx/contract.h that only sm_90a has.
#include "../../kernels/ptx/contract.h"
#include "../emulator/scheduler.hpp"
#include "../emulator/wgmma.hpp"
#include "instructions.hpp"

namespace simt {
namespace {

// [dst], [map, {c0, c1, c2, c3}], [barrier]
void bulk_copy(Frame& f, const Operation& o) {
  auto coordinate = [&](int i) { return get<int32_t>(f, o.slot[2 + i]); };
  ptx::cp_async_bulk_tensor_4d(get<uint32_t>(f, o.slot[0]), reinterpret_cast<const ptx::TensorMap*>(f.slots[o.slot[1]]),
                               get<uint32_t>(f, o.slot[6]), coordinate(0), coordinate(1), coordinate(2), coordinate(3));
}

// [map, {c0, c1, c2, c3}], [src]
void bulk_store(Frame& f, const Operation& o) {
  auto coordinate = [&](int i) { return get<int32_t>(f, o.slot[1 + i]); };
  ptx::cp_async_bulk_tensor_store_4d(reinterpret_cast<const ptx::TensorMap*>(f.slots[o.slot[0]]), get<uint32_t>(f, o.slot[5]),
                                     coordinate(0), coordinate(1), coordinate(2), coordinate(3));
}

uint32_t address(const Frame& f, const Operation& o) { return get<uint32_t>(f, o.slot[0]) + uint32_t(o.offset); }

// The signs of both operands and which of those in shared memory is MN-major: others are not modelled.
void want(const Frame& f, const Operation& o, int first, std::initializer_list<uint32_t> immediates) {
  for (uint32_t expected : immediates)
    if (get<uint32_t>(f, o.slot[first++]) != expected)
      fail(SIMT_UNSUPPORTED, "wgmma with other signs or majors than the emulator has (", at(o.pc), ")");
}

// {d…}, a, b, accumulate, 1, 1, 0, 0
template <int TILES, bool BF16>
void wgmma_shared(Frame& f, const Operation& o) {
  constexpr int D = TILES * 4;
  want(f, o, D + 3, {1, 1, 0, 0});
  const AccumulatorRegisters d{reinterpret_cast<char*>(f.slots), o.slot};
  issue_wgmma(BF16, d, TILES * 8, nullptr, f.slots[o.slot[D]], f.slots[o.slot[D + 1]], f.slots[o.slot[D + 2]] != 0, o.pc);
}

// {d…}, {a0, a1, a2, a3}, b, accumulate, 1, 1, 1
template <int TILES, bool BF16>
void wgmma_registers(Frame& f, const Operation& o) {
  constexpr int D = TILES * 4;
  want(f, o, D + 6, {1, 1, 1});
  uint32_t a[4];
  for (int i = 0; i < 4; i++) a[i] = get<uint32_t>(f, o.slot[D + i]);
  const AccumulatorRegisters d{reinterpret_cast<char*>(f.slots), o.slot};
  issue_wgmma(BF16, d, TILES * 8, a, 0, f.slots[o.slot[D + 4]], f.slots[o.slot[D + 5]] != 0, o.pc);
}

// N of 8 to 256.
template <int TILES>
void add_wgmma(std::vector<Instruction>& table) {
  auto add = [&](const char* type, const char* overload, void (*run)(Frame&, const Operation&), const char* operands) {
    const std::string product = "k16.f32." + std::string(type) + "." + type + overload;
    // Names live as long as the program.
    const auto* name = new std::string("wgmma.mma_async.sync.aligned.m64n" + std::to_string(8 * TILES) + product);
    table.push_back({name->c_str(), run, operands, true, TILES * 4});
  };
  add("f16", "", &wgmma_shared<TILES, false>, "Lsssssss");
  add("bf16", "", &wgmma_shared<TILES, true>, "Lsssssss");
  add("f16", " of registers", &wgmma_registers<TILES, false>, "L4sssss");
  add("bf16", " of registers", &wgmma_registers<TILES, true>, "L4sssss");
  if constexpr (TILES < 32) add_wgmma<TILES + 1>(table);
}

}  // namespace

void add_primitives_sm90a(std::vector<Instruction>& table) {
  using F = Frame;
  using O = Operation;
  const size_t first = table.size();
  add_wgmma<1>(table);
  table.insert(table.end(), {
      {"elect.sync", [](F& f, const O& o) {
         if (get<uint32_t>(f, o.slot[1]) != ALL_LANES) fail(SIMT_UNSUPPORTED, "elect.sync of some lanes (", at(o.pc), ")");
         f.slots[o.slot[0]] = ptx::elect_sync();
       }, "es"},
      {"setmaxnreg.inc.sync.aligned.u32", [](F&, const O& o) { setmaxnreg_inc(uint32_t(o.offset)); }, "i"},
      {"setmaxnreg.dec.sync.aligned.u32", [](F&, const O& o) { setmaxnreg_dec(uint32_t(o.offset)); }, "i"},
      {"mbarrier.init.shared::cta.b64", [](F& f, const O& o) { ptx::mbarrier_init(address(f, o), get<uint32_t>(f, o.slot[1])); }, "ms"},
      {"fence.mbarrier_init.release.cluster", [](F&, const O&) { ptx::fence_mbarrier_init(); }, ""},
      {"mbarrier.arrive.shared::cta.b64", [](F& f, const O& o) { ptx::mbarrier_arrive(address(f, o)); }, "_m"},
      {"mbarrier.arrive.expect_tx.shared::cta.b64", [](F& f, const O& o) {
         ptx::mbarrier_arrive_expect_tx(address(f, o), get<uint32_t>(f, o.slot[1]));
       }, "_ms"},
      {"mbarrier.try_wait.parity.shared::cta.b64", [](F& f, const O& o) {
         f.slots[o.slot[0]] = ptx::mbarrier_try_wait_parity(get<uint32_t>(f, o.slot[1]) + uint32_t(o.offset), get<uint32_t>(f, o.slot[2]));
       }, "dms"},
      {"fence.proxy.async.shared::cta", [](F&, const O&) { ptx::fence_proxy_async_shared_cta(); }, ""},
      {"cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes", &bulk_copy, "ata"},
      {"cp.async.bulk.tensor.4d.global.shared::cta.bulk_group", &bulk_store, "ta"},
      {"cp.async.bulk.commit_group", [](F&, const O&) { ptx::cp_async_bulk_commit_group(); }, ""},
      {"cp.async.bulk.wait_group.read", [](F&, const O& o) { cp_async_bulk_wait_group_read(int(o.offset)); }, "i"},
      {"wgmma.fence.sync.aligned", [](F&, const O&) { ptx::wgmma_fence(); }, ""},
      {"wgmma.commit_group.sync.aligned", [](F&, const O&) { ptx::wgmma_commit_group(); }, ""},
      {"wgmma.wait_group.sync.aligned", [](F&, const O& o) { wgmma_wait_group(int(o.offset)); }, "i"},
  });
  for (size_t i = first; i < table.size(); i++) table[i].primitive = true;
}

}  // namespace simt
