// Runs a program as one thread of the emulator.
#include "../emulator/state.hpp"
#include "../../kernels/ptx/contract.h"
#include "instructions.hpp"
#include "program.hpp"

#include <map>

namespace simt {

const Instruction* find_instruction(const std::string& name) {
  static const std::map<std::string, Instruction> known = [] {
    std::vector<Instruction> table;
    add_arithmetic(table);
    add_memory(table);
    add_primitives(table);
    add_primitives_sm90a(table);
    std::map<std::string, Instruction> by_name;
    for (const Instruction& instruction : table) by_name.emplace(instruction.name, instruction);
    return by_name;
  }();
  auto found = known.find(name);
  return found == known.end() ? nullptr : &found->second;
}

namespace {

uint64_t value_of(Special special) {
  const Index thread = thread_index(), block = block_index(), threads = block_dimensions(), blocks = grid_dimensions();
  switch (special) {
    case Special::TidX: return thread.x;
    case Special::TidY: return thread.y;
    case Special::TidZ: return thread.z;
    case Special::CtaidX: return block.x;
    case Special::CtaidY: return block.y;
    case Special::CtaidZ: return block.z;
    case Special::NtidX: return threads.x;
    case Special::NtidY: return threads.y;
    case Special::NtidZ: return threads.z;
    case Special::NctaidX: return blocks.x;
    case Special::NctaidY: return blocks.y;
    case Special::NctaidZ: return blocks.z;
    case Special::Laneid: return self->lane;
  }
  return 0;
}

}  // namespace

void interpret(const Program& program, const void* params) {
  // Registers are not cleared: what one thread left there is what another finds, as on a GPU.
  static thread_local std::vector<std::vector<uint64_t>> files;
  if (files.size() < block->threads.size()) files.resize(block->threads.size());
  std::vector<uint64_t>& slots = files[self->id];
  if (slots.size() < program.slots) slots.resize(program.slots, 0x7ff7dead7ff7dead);
  memcpy(slots.data(), program.constants.data(), program.constants.size() * sizeof(uint64_t));
  for (const Program::Filled& filled : program.specials) slots[filled.slot] = value_of(filled.special);
  for (uint32_t slot : program.param_addresses) slots[slot] = reinterpret_cast<uint64_t>(params);

  Frame frame{slots.data(), 0, false};
  const Operation* operations = program.operations.data();
  while (!frame.done) {
    const Operation& operation = operations[frame.next++];
    if (operation.guard != NO_GUARD && (frame.slots[operation.guard] != 0) == operation.unless) continue;
    if (operation.primitive) interpreted_at = operation.pc;
    operation.run(frame, operation);
  }
}

}  // namespace simt
