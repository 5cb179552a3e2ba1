// The instructions of kernels/ptx/contract.h: the emulator's own functions, with operands as the instruction has them.
#include "../../kernels/ptx/contract.h"
#include "../emulator/scheduler.hpp"
#include "instructions.hpp"

namespace simt {
namespace {

template <int N>
void take(const Frame& f, const uint32_t* slots, uint32_t (&values)[N]) {
  for (int i = 0; i < N; i++) values[i] = get<uint32_t>(f, slots[i]);
}

// {d…}, [row]
template <int N, void (*LDMATRIX)(uint32_t (&)[N], uint32_t)>
void ldmatrix(Frame& f, const Operation& o) {
  uint32_t values[N];
  LDMATRIX(values, get<uint32_t>(f, o.slot[N]) + uint32_t(o.offset));
  for (int i = 0; i < N; i++) set(f, o.slot[i], values[i]);
}

// {d0..d3}, {a…}, {b…}, {c0..c3}
template <class Element>
void mma_k16(Frame& f, const Operation& o) {
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = get<float>(f, o.slot[10 + i]);
  uint32_t a[4];
  take(f, o.slot + 4, a);
  ptx::mma_m16n8k16(Element(), d, a, get<uint32_t>(f, o.slot[8]), get<uint32_t>(f, o.slot[9]));
  for (int i = 0; i < 4; i++) set(f, o.slot[i], d[i]);
}
template <class Element>
void mma_k8(Frame& f, const Operation& o) {
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = get<float>(f, o.slot[7 + i]);
  uint32_t a[2];
  take(f, o.slot + 4, a);
  ptx::mma_m16n8k8(Element(), d, a, get<uint32_t>(f, o.slot[6]));
  for (int i = 0; i < 4; i++) set(f, o.slot[i], d[i]);
}

// d, a, b, 0x1f, 0xffffffff: other clamps and masks are not modelled.
template <float (*SHFL)(float, uint32_t)>
void shfl(Frame& f, const Operation& o) {
  if (get<uint32_t>(f, o.slot[3]) != 0x1f || get<uint32_t>(f, o.slot[4]) != ALL_LANES)
    fail(SIMT_UNSUPPORTED, "shfl.sync with another clamp or mask than 0x1f and all lanes (", at(o.pc), ")");
  set(f, o.slot[0], SHFL(get<float>(f, o.slot[1]), get<uint32_t>(f, o.slot[2])));
}

void bar_warp(Frame& f, const Operation& o) {
  if (get<uint32_t>(f, o.slot[0]) != ALL_LANES)
    fail(SIMT_UNSUPPORTED, "bar.warp.sync of some lanes (", at(o.pc), ")");
  ptx::bar_warp_sync();
}

// [dst], [src], cp-size, src-size
template <uint32_t BYTES, void (*COPY)(uint32_t, const void*, uint32_t)>
void cp_async(Frame& f, const Operation& o) {
  if (get<uint32_t>(f, o.slot[2]) != BYTES)
    fail(SIMT_UNSUPPORTED, "cp.async of ", get<uint32_t>(f, o.slot[2]), " bytes (", at(o.pc), ")");
  COPY(get<uint32_t>(f, o.slot[0]), reinterpret_cast<const void*>(f.slots[o.slot[1]]), get<uint32_t>(f, o.slot[3]));
}
void cp_async_ca(Frame& f, const Operation& o) {
  if (get<uint32_t>(f, o.slot[2]) == 4) cp_async<4, &ptx::cp_async_ca_4>(f, o);
  else cp_async<8, &ptx::cp_async_ca_8>(f, o);
}

}  // namespace

void add_primitives(std::vector<Instruction>& table) {
  using F = Frame;
  using O = Operation;
  const size_t first = table.size();
  table.insert(table.end(), {
      {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", &ldmatrix<4, &ptx::ldmatrix_x4>, "4m"},
      {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", &ldmatrix<4, &ptx::ldmatrix_x4_trans>, "4m"},
      {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", &ldmatrix<2, &ptx::ldmatrix_x2>, "2m"},
      {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", &ldmatrix<2, &ptx::ldmatrix_x2_trans>, "2m"},
      {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", &mma_k16<ptx::F16>, "4424"},
      {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", &mma_k16<ptx::BF16>, "4424"},
      {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", &mma_k8<ptx::F16>, "4214"},
      {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", &mma_k8<ptx::BF16>, "4214"},
      {"shfl.sync.bfly.b32", &shfl<&ptx::shfl_bfly_f32>, "dssss"},
      {"shfl.sync.idx.b32", &shfl<&ptx::shfl_idx_f32>, "dssss"},
      {"ex2.approx.ftz.f32", [](F& f, const O& o) { set(f, o.slot[0], ptx::ex2_approx_ftz_f32(get<float>(f, o.slot[1]))); }, "ds"},
      {"lg2.approx.ftz.f32", [](F& f, const O& o) { set(f, o.slot[0], ptx::lg2_approx_ftz_f32(get<float>(f, o.slot[1]))); }, "ds"},
      {"rcp.approx.ftz.f32", [](F& f, const O& o) { set(f, o.slot[0], ptx::rcp_approx_ftz_f32(get<float>(f, o.slot[1]))); }, "ds"},
      {"cvt.rn.f16x2.f32", [](F& f, const O& o) {
         set(f, o.slot[0], ptx::cvt_rn_f16x2_f32(get<float>(f, o.slot[1]), get<float>(f, o.slot[2])));
       }, "dss"},
      {"cvt.rn.bf16x2.f32", [](F& f, const O& o) {
         set(f, o.slot[0], ptx::cvt_rn_bf16x2_f32(get<float>(f, o.slot[1]), get<float>(f, o.slot[2])));
       }, "dss"},
      {"cvt.f32.f16", [](F& f, const O& o) { set(f, o.slot[0], ptx::cvt_f32_f16(get<uint16_t>(f, o.slot[1]))); }, "ds"},
      {"cp.async.cg.shared.global", &cp_async<16, &ptx::cp_async_cg_16>, "aass"},
      {"cp.async.ca.shared.global", &cp_async_ca, "aass"},
      {"cp.async.commit_group", [](F&, const O&) { ptx::cp_async_commit_group(); }, ""},
      {"cp.async.wait_group", [](F&, const O& o) { cp_async_wait_group(int(o.offset)); }, "i"},
      {"bar.sync", [](F& f, const O& o) {
         if (get<uint32_t>(f, o.slot[0]) != 0) fail(SIMT_UNSUPPORTED, "bar.sync ", get<uint32_t>(f, o.slot[0]), " of all threads (", at(o.pc), ")");
         ptx::barrier_cta();
       }, "s"},
      {"bar.sync of some", [](F& f, const O& o) { ptx::bar_sync(get<uint32_t>(f, o.slot[0]), get<uint32_t>(f, o.slot[1])); }, "ss"},
      {"bar.warp.sync", &bar_warp, "s"},
      {"red.relaxed.gpu.global.add.f32", [](F& f, const O& o) {
         ptx::red_add_f32(reinterpret_cast<float*>(f.slots[o.slot[0]] + uint64_t(o.offset)), get<float>(f, o.slot[1]));
       }, "ms"},
      {"atom.relaxed.gpu.global.add.u32", [](F& f, const O& o) {
         auto* address = reinterpret_cast<uint32_t*>(f.slots[o.slot[1]] + uint64_t(o.offset));
         set(f, o.slot[0], ptx::atom_add_u32(address, get<uint32_t>(f, o.slot[2])));
       }, "dms"},
      {"fence.acq_rel.gpu", [](F&, const O&) { ptx::fence_acq_rel_gpu(); }, ""},
  });
  for (size_t i = first; i < table.size(); i++) table[i].primitive = true;
}

}  // namespace simt
