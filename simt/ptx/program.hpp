// A kernel as nvcc's PTX has it, ready to be interpreted: what every thread of a launch executes in place of compiled C++.
//
// Registers are 8-byte slots. Immediates, special registers and addresses of symbols are slots as well, filled in when a
// thread starts, so that an instruction knows of slots only.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../emulator/sites.hpp"

namespace simt {

struct Operation;

// A thread in the middle of a program.
struct Frame {
  uint64_t* slots;
  uint32_t next;  // operation
  bool done;
};

struct Operation {
  void (*run)(Frame& frame, const Operation& operation);
  const uint32_t* slot;  // operands, as the instruction has them
  int64_t offset;        // of an address; the target of a branch; the count of a wait
  uint32_t guard;        // slot of the predicate that allows it; NO_GUARD: none
  bool unless;           // the predicate forbids it
  bool primitive;        // one that asks where it stands
  Pc pc;
};
constexpr uint32_t NO_GUARD = 0xffffffff;

enum class Special : uint8_t { TidX, TidY, TidZ, CtaidX, CtaidY, CtaidZ, NtidX, NtidY, NtidZ, NctaidX, NctaidY, NctaidZ, Laneid };

struct Program {
  std::string name;
  uint32_t param_bytes = 0;
  std::vector<Operation> operations;
  std::vector<uint32_t> operands;  // what Operation::slot points into
  uint32_t slots = 0;
  // Filled in at the start. Constants have the first slots.
  std::vector<uint64_t> constants;
  struct Filled {
    uint32_t slot;
    Special special;
  };
  std::vector<Filled> specials;
  std::vector<uint32_t> param_addresses;  // slots that hold the address of the parameter block
};

// Reads one kernel of a PTX module; `error` says what is wrong, or what is not known, with the line.
bool parse_ptx(const std::string& text, const std::string& kernel, Program& program, std::string& error);

// Executes the program as the running thread.
void interpret(const Program& program, const void* params);

// What an instruction does, by its full name, and what its operands are, one letter each:
//   d  slot that is written     s  slot that is read      4 2 1  as many slots in braces
//   m  [slot + offset]          a  [slot]
//   L  `listed` slots in braces                           t  [slot, {4 slots}], a tensor map and coordinates
//   _  a result that is not wanted                        e  _|slot, an elected lane and whether it is this one
//   l  label                    i  whole number           (labels, numbers and offsets become Operation::offset)
struct Instruction {
  const char* name;
  void (*run)(Frame&, const Operation&);
  const char* operands;
  bool primitive = false;
  int listed = 0;
};
const Instruction* find_instruction(const std::string& name);

}  // namespace simt
