// Arithmetic, comparison, selection, conversion, branches. "Instruction Set" of the PTX ISA, section by section.
#include <algorithm>
#include <cmath>

#include "../emulator/half.hpp"
#include "instructions.hpp"

namespace simt {
namespace {

using Handler = void (*)(Frame&, const Operation&);

template <class T, class F>
inline void binary(Frame& f, const Operation& o, F apply) {
  set<T>(f, o.slot[0], apply(get<T>(f, o.slot[1]), get<T>(f, o.slot[2])));
}

// Signed sums and products wrap around: they are done unsigned.
#define BINARY(name, T, expression) \
  table.push_back({name, [](Frame& f, const Operation& o) { binary<T>(f, o, [](T a, T b) -> T { return expression; }); }, "dss"})

// 16 bits are promoted to a signed type, whose products may overflow: multiplied as 64 bits they cannot.
template <class U>
U product(U a, U b) {
  return U(uint64_t(a) * uint64_t(b));
}

// Shift amounts are 32-bit; what is shifted out is gone, and so is all of it from the width on.
template <class T>
void shift_left(Frame& f, const Operation& o) {
  const uint32_t by = get<uint32_t>(f, o.slot[2]);
  set<T>(f, o.slot[0], by >= sizeof(T) * 8 ? T(0) : T(get<T>(f, o.slot[1]) << by));
}
template <class T>
void shift_right(Frame& f, const Operation& o) {
  const uint32_t by = std::min<uint32_t>(get<uint32_t>(f, o.slot[2]), sizeof(T) * 8);
  const T value = get<T>(f, o.slot[1]);
  const T whole = std::is_signed<T>::value && value < 0 ? T(-1) : T(0);
  set<T>(f, o.slot[0], by >= sizeof(T) * 8 ? whole : T(value >> by));
}

enum class Comparison { Eq, Ne, Lt, Le, Gt, Ge, Neu, Ltu, Leu, Gtu, Geu, Equ, Num, Nan };

template <class T>
bool compare(Comparison how, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (how) {
    case Comparison::Eq: return a == b;
    case Comparison::Ne: return !unordered && a != b;
    case Comparison::Lt: return a < b;
    case Comparison::Le: return a <= b;
    case Comparison::Gt: return a > b;
    case Comparison::Ge: return a >= b;
    case Comparison::Equ: return unordered || a == b;
    case Comparison::Neu: return unordered || a != b;
    case Comparison::Ltu: return unordered || a < b;
    case Comparison::Leu: return unordered || a <= b;
    case Comparison::Gtu: return unordered || a > b;
    case Comparison::Geu: return unordered || a >= b;
    case Comparison::Num: return !unordered;
    case Comparison::Nan: return unordered;
  }
  return false;
}

template <class T, Comparison HOW>
void setp(Frame& f, const Operation& o) {
  f.slots[o.slot[0]] = compare(HOW, get<T>(f, o.slot[1]), get<T>(f, o.slot[2]));
}

template <class T>
void selp(Frame& f, const Operation& o) {
  set<T>(f, o.slot[0], get<T>(f, o.slot[f.slots[o.slot[3]] ? 1 : 2]));
}

template <class T>
void mov(Frame& f, const Operation& o) {
  set<T>(f, o.slot[0], get<T>(f, o.slot[1]));
}

// d, {low, high} and {low, high}, a
template <class Whole, class Part>
void pack(Frame& f, const Operation& o) {
  set<Whole>(f, o.slot[0], Whole(get<Part>(f, o.slot[1])) | Whole(get<Part>(f, o.slot[2])) << sizeof(Part) * 8);
}
template <class Whole, class Part>
void unpack(Frame& f, const Operation& o) {
  const Whole whole = get<Whole>(f, o.slot[2]);
  set<Part>(f, o.slot[0], Part(whole));
  set<Part>(f, o.slot[1], Part(whole >> sizeof(Part) * 8));
}

template <class To, class From>
void convert(Frame& f, const Operation& o) {
  set<To>(f, o.slot[0], To(get<From>(f, o.slot[1])));
}

template <class Wide, class T>
void mul_wide(Frame& f, const Operation& o) {
  set<Wide>(f, o.slot[0], Wide(get<T>(f, o.slot[1])) * Wide(get<T>(f, o.slot[2])));
}

void bfi(Frame& f, const Operation& o) {
  const uint32_t a = get<uint32_t>(f, o.slot[1]), b = get<uint32_t>(f, o.slot[2]);
  const uint32_t at = get<uint32_t>(f, o.slot[3]) & 0xff, length = get<uint32_t>(f, o.slot[4]) & 0xff;
  const uint64_t field = at >= 32 ? 0 : ((uint64_t(1) << std::min(length, 32u)) - 1) << at;
  set<uint32_t>(f, o.slot[0], uint32_t((uint64_t(b) & ~field) | ((uint64_t(a) << std::min(at, 63u)) & field)));
}

// Bytes of the 64 bits {b, a}: each nibble of c picks one, or, with its top bit, that byte's sign eight times.
void prmt(Frame& f, const Operation& o) {
  const uint64_t bytes = get<uint32_t>(f, o.slot[1]) | uint64_t(get<uint32_t>(f, o.slot[2])) << 32;
  const uint32_t picks = get<uint32_t>(f, o.slot[3]);
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t pick = picks >> 4 * i & 0xf;
    uint32_t byte = uint32_t(bytes >> 8 * (pick & 7)) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  set<uint32_t>(f, o.slot[0], result);
}

// Of two NaNs, max and min make this one.
float canonical_nan() {
  const uint32_t bits = 0x7fffffff;
  float nan;
  memcpy(&nan, &bits, sizeof nan);
  return nan;
}

// The larger one; a NaN gives way; +0 is larger than -0.
float max_f32(float a, float b) {
  if (a != a && b != b) return canonical_nan();
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
}
float min_f32(float a, float b) {
  if (a != a && b != b) return canonical_nan();
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
}

void branch(Frame& f, const Operation& o) { f.next = uint32_t(o.offset); }
void ret(Frame& f, const Operation&) { f.done = true; }

template <class T, class U>
void add_integers(std::vector<Instruction>& table, const std::string& s, const std::string& u, const std::string& b) {
  // Names live as long as the program.
  auto name = [](const std::string& text) { return (new std::string(text))->c_str(); };
  for (const std::string& type : {s, u}) {
    BINARY(name("add." + type), U, U(a + b));
    BINARY(name("sub." + type), U, U(a - b));
    BINARY(name("mul.lo." + type), U, product(a, b));
  }
  BINARY(name("min." + s), T, std::min(a, b));
  BINARY(name("max." + s), T, std::max(a, b));
  BINARY(name("min." + u), U, std::min(a, b));
  BINARY(name("max." + u), U, std::max(a, b));
  // What a division by zero gives is unspecified; nothing is trapped.
  BINARY(name("div." + s), T, b == 0 ? T(-1) : b == T(-1) ? T(U(0) - U(a)) : T(a / b));
  BINARY(name("div." + u), U, b == 0 ? U(-1) : U(a / b));
  BINARY(name("rem." + s), T, b == 0 || b == T(-1) ? T(0) : T(a % b));
  BINARY(name("rem." + u), U, b == 0 ? a : U(a % b));
  BINARY(name("and." + b), U, U(a & b));
  BINARY(name("or." + b), U, U(a | b));
  BINARY(name("xor." + b), U, U(a ^ b));
  table.push_back({name("not." + b), [](Frame& f, const Operation& o) { set<U>(f, o.slot[0], U(~get<U>(f, o.slot[1]))); }, "ds"});
  table.push_back({name("neg." + s), [](Frame& f, const Operation& o) { set<U>(f, o.slot[0], U(0 - get<U>(f, o.slot[1]))); }, "ds"});
  table.push_back({name("shl." + b), &shift_left<U>, "dss"});
  table.push_back({name("shr." + s), &shift_right<T>, "dss"});
  table.push_back({name("shr." + u), &shift_right<U>, "dss"});
  table.push_back({name("shr." + b), &shift_right<U>, "dss"});
  auto mad = [](Frame& f, const Operation& o) {
    set<U>(f, o.slot[0], U(product(get<U>(f, o.slot[1]), get<U>(f, o.slot[2])) + get<U>(f, o.slot[3])));
  };
  for (const std::string& type : {s, u}) table.push_back({name("mad.lo." + type), mad, "dsss"});
  for (const std::string& type : {s, u, b}) {
    table.push_back({name("mov." + type), &mov<U>, "ds"});
    table.push_back({name("selp." + type), &selp<U>, "dsss"});
  }
  auto comparisons = [&](const std::string& type, auto example) {
    using V = decltype(example);
    table.push_back({name("setp.eq." + type), &setp<V, Comparison::Eq>, "dss"});
    table.push_back({name("setp.ne." + type), &setp<V, Comparison::Ne>, "dss"});
    table.push_back({name("setp.lt." + type), &setp<V, Comparison::Lt>, "dss"});
    table.push_back({name("setp.le." + type), &setp<V, Comparison::Le>, "dss"});
    table.push_back({name("setp.gt." + type), &setp<V, Comparison::Gt>, "dss"});
    table.push_back({name("setp.ge." + type), &setp<V, Comparison::Ge>, "dss"});
  };
  comparisons(s, T());
  comparisons(u, U());
  comparisons(b, U());
}

}  // namespace

void add_arithmetic(std::vector<Instruction>& table) {
  add_integers<int16_t, uint16_t>(table, "s16", "u16", "b16");
  add_integers<int32_t, uint32_t>(table, "s32", "u32", "b32");
  add_integers<int64_t, uint64_t>(table, "s64", "u64", "b64");
  table.insert(table.end(), {
      {"mul.wide.s16", &mul_wide<int32_t, int16_t>, "dss"},
      {"mul.wide.u16", &mul_wide<uint32_t, uint16_t>, "dss"},
      {"mul.wide.s32", &mul_wide<int64_t, int32_t>, "dss"},
      {"mul.wide.u32", &mul_wide<uint64_t, uint32_t>, "dss"},
      {"bfi.b32", &bfi, "dssss"},
      {"prmt.b32", &prmt, "dsss"},
      {"bra", &branch, "l"},
      {"bra.uni", &branch, "l"},
      {"ret", &ret, ""},

      {"mov.f32", &mov<uint32_t>, "ds"},
      {"selp.f32", &selp<uint32_t>, "dsss"},
      {"mov.pred", &mov<uint64_t>, "ds"},
      {"mov.b32 packed", &pack<uint32_t, uint16_t>, "d2"},
      {"mov.b64 packed", &pack<uint64_t, uint32_t>, "d2"},
      {"mov.b32 unpacked", &unpack<uint32_t, uint16_t>, "2s"},
      {"mov.b64 unpacked", &unpack<uint64_t, uint32_t>, "2s"},

      {"cvt.s64.s32", &convert<int64_t, int32_t>, "ds"},
      {"cvt.u64.u32", &convert<uint64_t, uint32_t>, "ds"},
      {"cvt.u32.u64", &convert<uint32_t, uint64_t>, "ds"},
      {"cvt.s32.s64", &convert<int32_t, int64_t>, "ds"},
      {"cvt.u64.u16", &convert<uint64_t, uint16_t>, "ds"},
      {"cvt.u32.u16", &convert<uint32_t, uint16_t>, "ds"},
      {"cvt.u16.u32", &convert<uint16_t, uint32_t>, "ds"},
      {"cvt.u16.u64", &convert<uint16_t, uint64_t>, "ds"},
      {"cvt.s32.s16", &convert<int32_t, int16_t>, "ds"},
      {"cvt.rn.f32.s32", &convert<float, int32_t>, "ds"},
      {"cvt.rn.f32.u32", &convert<float, uint32_t>, "ds"},
  });
  BINARY("mul.hi.s32", int32_t, int32_t(int64_t(a) * b >> 32));
  BINARY("mul.hi.u32", uint32_t, uint32_t(uint64_t(a) * b >> 32));
  BINARY("and.pred", uint64_t, a & b);
  BINARY("or.pred", uint64_t, a | b);
  BINARY("xor.pred", uint64_t, a ^ b);
  BINARY("add.f32", float, a + b);
  BINARY("sub.f32", float, a - b);
  BINARY("mul.f32", float, a * b);
  BINARY("add.rn.f32", float, a + b);
  BINARY("sub.rn.f32", float, a - b);
  BINARY("mul.rn.f32", float, a * b);
  BINARY("div.rn.f32", float, a / b);
  BINARY("max.f32", float, max_f32(a, b));
  BINARY("min.f32", float, min_f32(a, b));
  auto unary = [&](const char* name, Handler run) { table.push_back({name, run, "ds"}); };
  unary("not.pred", [](Frame& f, const Operation& o) { f.slots[o.slot[0]] = !f.slots[o.slot[1]]; });
  unary("neg.f32", [](Frame& f, const Operation& o) { set(f, o.slot[0], get<uint32_t>(f, o.slot[1]) ^ 0x80000000u); });
  unary("abs.f32", [](Frame& f, const Operation& o) { set(f, o.slot[0], get<uint32_t>(f, o.slot[1]) & 0x7fffffffu); });
  unary("rcp.rn.f32", [](Frame& f, const Operation& o) { set(f, o.slot[0], 1.0f / get<float>(f, o.slot[1])); });
  table.push_back({"fma.rn.f32", [](Frame& f, const Operation& o) {
    set(f, o.slot[0], std::fma(get<float>(f, o.slot[1]), get<float>(f, o.slot[2]), get<float>(f, o.slot[3])));
  }, "dsss"});
#define SETP_F32(word, how) table.push_back({"setp." word ".f32", &setp<float, Comparison::how>, "dss"})
  SETP_F32("eq", Eq);
  SETP_F32("ne", Ne);
  SETP_F32("lt", Lt);
  SETP_F32("le", Le);
  SETP_F32("gt", Gt);
  SETP_F32("ge", Ge);
  SETP_F32("equ", Equ);
  SETP_F32("neu", Neu);
  SETP_F32("ltu", Ltu);
  SETP_F32("leu", Leu);
  SETP_F32("gtu", Gtu);
  SETP_F32("geu", Geu);
  SETP_F32("num", Num);
  SETP_F32("nan", Nan);
}

}  // namespace simt
