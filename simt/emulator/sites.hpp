// A site is a place in the kernel's source, held as 32 bits of return address until a report needs its file and line.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>

namespace simt {

using Pc = uint32_t;

// Every access of a kernel asks for variables of the OS thread. Declared this way they cost neither the call by which a shared
// library may find its own nor the question whether a constructor has run. All such of a library must be few: there is little
// room for them where it is loaded late.
#define SIMT_OF_OS_THREAD __thread __attribute__((tls_model("initial-exec")))

// Distance of a return address from a fixed object of this image: 32 bits suffice because kernels and emulator are
// linked into one image.
extern const char image_anchor;
inline Pc pc_of(const void* return_address) {
  return static_cast<Pc>(static_cast<const char*>(return_address) - &image_anchor);
}

// A site in PTX that is interpreted is its line, in numbers that no distance of an image's parts reaches.
constexpr Pc INTERPRETED = 0x80000000;
inline bool is_interpreted(Pc pc) { return pc >> 30 == INTERPRETED >> 30; }
// The instruction that this OS thread interprets; 0: what runs is compiled.
extern SIMT_OF_OS_THREAD Pc interpreted_at;
inline Pc site_of(const void* return_address) { return interpreted_at ? interpreted_at : pc_of(return_address); }

// What stands for a site in a message until `symbolise` has replaced it. Messages are composed on a fiber's small
// stack, where running another program would be unwise.
std::string at(Pc pc);

// The parts of a message, one after the other: strings and whole numbers.
inline std::string text() { return {}; }
template <class Part, class... Parts>
std::string text(const Part& part, const Parts&... parts) {
  std::string whole;
  if constexpr (std::is_arithmetic_v<Part>) whole = std::to_string(part);
  else whole = part;
  return whole += text(parts...);
}

// Replaces every site of `message` by its source lines, innermost inlined call first: "tile.h:40 <- kernel.h:12".
std::string symbolise(const std::string& message);

}  // namespace simt

// The site of the primitive or hook that evaluates this: where the kernel called it.
#define SIMT_CALLER (::simt::site_of(__builtin_return_address(0)))
