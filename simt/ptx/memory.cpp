// Loads, stores and conversions of addresses. Generic and global addresses are the host's; shared ones are those of the
// window.
#include "../emulator/memory.hpp"
#include "../../kernels/ptx/contract.h"
#include "instructions.hpp"

namespace simt {
namespace {

struct Global {
  static char* place(const Frame& f, const Operation& o, uint32_t slot, size_t, Pc) {
    return reinterpret_cast<char*>(f.slots[slot] + uint64_t(o.offset));
  }
};
struct Shared {
  static char* place(const Frame& f, const Operation& o, uint32_t slot, size_t bytes, Pc pc) {
    const uint32_t address = get<uint32_t>(f, slot) + uint32_t(o.offset);
    return block->shared + shared_offset(address, uint32_t(bytes), "an access", pc);
  }
};

// Operands: the values, then the address.
template <class Space, class T, int N>
void load(Frame& f, const Operation& o) {
  T values[N];
  const char* from = Space::place(f, o, o.slot[N], sizeof values, o.pc);
  plain_access(from, sizeof values, false, true, o.pc);
  memcpy(values, from, sizeof values);
  for (int i = 0; i < N; i++) set(f, o.slot[i], values[i]);
}

// Operands: the address, then the values.
template <class Space, class T, int N>
void store(Frame& f, const Operation& o) {
  T values[N];
  for (int i = 0; i < N; i++) values[i] = get<T>(f, o.slot[1 + i]);
  char* to = Space::place(f, o, o.slot[0], sizeof values, o.pc);
  plain_access(to, sizeof values, true, true, o.pc);
  memcpy(to, values, sizeof values);
}

template <class T>
void add_width(std::vector<Instruction>& table, std::initializer_list<const char*> types) {
  auto name = [](const std::string& text) { return (new std::string(text))->c_str(); };
  for (const char* type : types) {
    auto add = [&](const std::string& space, auto kind) {
      using Space = decltype(kind);
      for (const std::string& cached : {std::string(), std::string(".nc")}) {
        if (!cached.empty() && space != ".global") continue;
        table.push_back({name("ld" + space + cached + "." + type), &load<Space, T, 1>, "dm"});
        table.push_back({name("ld" + space + cached + ".v2." + type), &load<Space, T, 2>, "2m"});
        table.push_back({name("ld" + space + cached + ".v4." + type), &load<Space, T, 4>, "4m"});
      }
      table.push_back({name("st" + space + "." + type), &store<Space, T, 1>, "ms"});
      table.push_back({name("st" + space + ".v2." + type), &store<Space, T, 2>, "m2"});
      table.push_back({name("st" + space + ".v4." + type), &store<Space, T, 4>, "m4"});
    };
    add(".global", Global());
    add(".shared", Shared());
    add("", Global());  // generic
    // The parameter block is a buffer like others: read by its name, or through a register that holds its address.
    table.push_back({name(std::string("ld.param.") + type), &load<Global, T, 1>, "dm"});
    table.push_back({name(std::string("ld.param.v2.") + type), &load<Global, T, 2>, "2m"});
    table.push_back({name(std::string("ld.param.v4.") + type), &load<Global, T, 4>, "4m"});
  }
}

void copy(Frame& f, const Operation& o) { f.slots[o.slot[0]] = f.slots[o.slot[1]]; }

void shared_to_generic(Frame& f, const Operation& o) {
  f.slots[o.slot[0]] = reinterpret_cast<uint64_t>(block->shared) + (f.slots[o.slot[1]] - SHARED_BASE);
}
void generic_to_shared(Frame& f, const Operation& o) {
  f.slots[o.slot[0]] = f.slots[o.slot[1]] - reinterpret_cast<uint64_t>(block->shared) + SHARED_BASE;
}

}  // namespace

void add_memory(std::vector<Instruction>& table) {
  add_width<uint8_t>(table, {"u8", "b8"});
  add_width<uint16_t>(table, {"u16", "b16"});
  add_width<uint32_t>(table, {"u32", "s32", "b32", "f32"});
  add_width<uint64_t>(table, {"u64", "s64", "b64"});
  table.insert(table.end(), {
      {"cvta.to.global.u64", &copy, "ds"},
      {"cvta.global.u64", &copy, "ds"},
      {"cvta.param.u64", &copy, "ds"},
      {"cvta.shared.u64", &shared_to_generic, "ds"},
      {"cvta.to.shared.u64", &generic_to_shared, "ds"},
  });
}

}  // namespace simt
