// How instructions reach their operands.
#pragma once
#include <cstring>

#include "program.hpp"

namespace simt {

// The slot's low bytes as a T; a write clears the rest.
template <class T>
inline T get(const Frame& frame, uint32_t slot) {
  T value;
  memcpy(&value, &frame.slots[slot], sizeof value);
  return value;
}
template <class T>
inline void set(Frame& frame, uint32_t slot, T value) {
  uint64_t whole = 0;
  memcpy(&whole, &value, sizeof value);
  frame.slots[slot] = whole;
}

void add_arithmetic(std::vector<Instruction>& table);
void add_memory(std::vector<Instruction>& table);
void add_primitives(std::vector<Instruction>& table);
void add_primitives_sm90a(std::vector<Instruction>& table);

}  // namespace simt
