// Reads PTX. Only what nvcc writes for one kernel without functions, local memory or tables; anything else is an error
// that names the line.
#include <cctype>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "../emulator/state.hpp"
#include "instructions.hpp"
#include "program.hpp"

namespace simt {
namespace {

struct Token {
  std::string text;
  uint32_t line;
};

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.' || c == '-'; }

// Words, with dots, signs and percents inside of them, and single punctuation marks. `::` belongs to a word.
std::vector<Token> split(const std::string& text) {
  std::vector<Token> tokens;
  uint32_t line = 1;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '\n') {
      line++;
      i++;
    } else if (std::isspace(static_cast<unsigned char>(c))) {
      i++;
    } else if (c == '/' && i + 1 < text.size() && text[i + 1] == '/') {
      i = std::min(text.find('\n', i), text.size());
    } else if (c == '"') {
      const size_t end = std::min(text.find('"', i + 1), text.size() - 1);
      tokens.push_back({text.substr(i, end - i + 1), line});
      i = end + 1;
    } else if (is_word(c)) {
      size_t end = i + 1;
      while (end < text.size() && (is_word(text[end]) || text.compare(end, 2, "::") == 0))
        end += text[end] == ':' ? 2 : 1;
      tokens.push_back({text.substr(i, end - i), line});
      i = end;
    } else {
      tokens.push_back({std::string(1, c), line});
      i++;
    }
  }
  return tokens;
}

class Parser {
 public:
  Parser(const std::string& text, Program& program) : tokens_(split(text)), program_(program) {}

  void kernel(const std::string& name) {
    find_entry(name);
    program_.name = name;
    parameter();
    // Directives of the entry: the launch says how many threads there are.
    while (!is("{")) next();
    next();
    scopes_.emplace_back();
    for (int depth = 1; depth > 0;) {
      if (is("{")) {
        scopes_.emplace_back();
        next();
        depth++;
      } else if (is("}")) {
        scopes_.pop_back();
        next();
        depth--;
      } else {
        statement();
      }
    }
    finish();
  }

 private:
  [[noreturn]] void wrong(const std::string& what) const {
    const uint32_t line = at_ < tokens_.size() ? tokens_[at_].line : 0;
    throw std::runtime_error("PTX line " + std::to_string(line) + ": " + what + (reading_.empty() ? "" : " in `" + reading_ + "`"));
  }

  // Whether the token so many further on is this one.
  bool is(const char* text, size_t ahead = 0) const {
    return at_ + ahead < tokens_.size() && tokens_[at_ + ahead].text == text;
  }
  const std::string& peek() const {
    if (at_ >= tokens_.size()) wrong("the text ends too soon");
    return tokens_[at_].text;
  }
  std::string next() {
    std::string text = peek();
    at_++;
    return text;
  }
  void expect(const char* text) {
    if (!is(text)) wrong("`" + std::string(text) + "` expected, not `" + peek() + "`");
    at_++;
  }
  void skip_to_semicolon() {
    while (next() != ";") {
    }
  }

  // Everything before the kernel that it may use: shared arrays of unknown size.
  void find_entry(const std::string& name) {
    while (at_ < tokens_.size()) {
      if (is(".entry") && is(name.c_str(), 1)) {
        at_ += 2;
        return;
      }
      if (is(".extern") && is(".shared", 1)) {
        // .extern .shared .align N .b8 NAME[];
        while (!is("[")) next();
        symbols_[tokens_[at_ - 1].text] = SHARED_BASE;
      }
      next();
    }
    wrong("there is no kernel " + name);
  }

  // ( .param .align N .b8 NAME[BYTES] ) or nothing
  void parameter() {
    expect("(");
    if (!is(")")) {
      while (!is("[") && !is(")")) next();
      if (!is("[")) wrong("a parameter that is no block of bytes");
      parameter_ = tokens_[at_ - 1].text;
      next();
      program_.param_bytes = uint32_t(std::strtoul(next().c_str(), nullptr, 10));
      expect("]");
    }
    if (is(",")) wrong("more than one parameter");
    expect(")");
  }

  void statement() {
    const std::string word = peek();
    if (word[0] == '.') return directive();
    if (is(":", 1)) {
      labels_[word] = uint32_t(program_.operations.size());
      at_ += 2;
      return;
    }
    instruction();
  }

  void directive() {
    const uint32_t line = tokens_[at_].line;
    const std::string word = next();
    if (word == ".reg") {
      const std::string type = next();
      do {
        if (is(",")) next();
        const std::string name = next();
        if (is("<")) {
          next();
          const unsigned count = unsigned(std::strtoul(next().c_str(), nullptr, 10));
          expect(">");
          for (unsigned i = 0; i < count; i++) declare(name + std::to_string(i));
        } else {
          declare(name);
        }
      } while (is(","));
      expect(";");
    } else if (word == ".pragma") {
      skip_to_semicolon();
    } else if (word == ".loc") {
      while (at_ < tokens_.size() && tokens_[at_].line == line) at_++;  // ends with its line
    } else {
      at_--;
      wrong("the directive " + word + " is not known");
    }
  }

  void declare(const std::string& name) { scopes_.back()[name] = registers_++; }

  // A slot of its own for a constant; equal ones share it. Numbered from the end until the count is known.
  uint32_t constant(uint64_t value) {
    auto known = constants_.emplace(value, uint32_t(program_.constants.size()));
    if (known.second) program_.constants.push_back(value);
    return CONSTANT | known.first->second;
  }

  uint32_t slot_of(const std::string& word) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      auto found = scope->find(word);
      if (found != scope->end()) return found->second;
    }
    if (auto symbol = symbols_.find(word); symbol != symbols_.end()) return constant(symbol->second);
    if (!parameter_.empty() && word == parameter_) {
      if (parameter_slot_ == NONE) program_.param_addresses.push_back(parameter_slot_ = registers_++);
      return parameter_slot_;
    }
    static const std::map<std::string, Special> specials = {
        {"%tid.x", Special::TidX},       {"%tid.y", Special::TidY},       {"%tid.z", Special::TidZ},
        {"%ctaid.x", Special::CtaidX},   {"%ctaid.y", Special::CtaidY},   {"%ctaid.z", Special::CtaidZ},
        {"%ntid.x", Special::NtidX},     {"%ntid.y", Special::NtidY},     {"%ntid.z", Special::NtidZ},
        {"%nctaid.x", Special::NctaidX}, {"%nctaid.y", Special::NctaidY}, {"%nctaid.z", Special::NctaidZ},
        {"%laneid", Special::Laneid}};
    if (auto special = specials.find(word); special != specials.end()) {
      auto known = special_slots_.emplace(special->second, registers_);
      if (known.second) program_.specials.push_back({registers_++, special->second});
      return known.first->second;
    }
    uint64_t value;
    if (number(word, value)) return constant(value);
    wrong("`" + word + "` is neither a register nor a number");
  }

  // 12, -12, 0x1f, 0f3F800000 (the bits of an f32), 0d… (of an f64)
  static bool number(const std::string& word, uint64_t& value) {
    const char* digits = word.c_str() + (word[0] == '-');
    if (!std::isdigit(static_cast<unsigned char>(*digits))) return false;
    char* end;
    if (digits[0] == '0' && (digits[1] == 'f' || digits[1] == 'F' || digits[1] == 'd' || digits[1] == 'D')) {
      value = std::strtoull(digits + 2, &end, 16);
      return *end == 0;
    }
    value = std::strtoull(digits, &end, 0);
    if (word[0] == '-') value = 0 - value;
    return *end == 0 || (*end == 'U' && end[1] == 0);
  }

  void instruction() {
    Operation operation{};
    operation.guard = NO_GUARD;
    operation.pc = INTERPRETED | tokens_[at_].line;
    if (is("@")) {
      next();
      if (is("!")) {
        next();
        operation.unless = true;
      }
      operation.guard = slot_of(next());
    }
    std::string name = next();
    // Overloads that the operands tell apart.
    if ((name == "mov.b32" || name == "mov.b64") && is("{")) name += " unpacked";
    else if ((name == "mov.b32" || name == "mov.b64") && is("{", 2)) name += " packed";
    else if (name == "bar.sync" && is(",", 1)) name += " of some";
    else if (name.rfind("wgmma.mma_async", 0) == 0 && is_list_behind_list()) name += " of registers";
    const Instruction* instruction = find_instruction(name);
    if (!instruction) wrong("the instruction `" + name + "` is not known");
    reading_ = name;
    operation.run = instruction->run;
    operation.primitive = instruction->primitive;
    const size_t first = program_.operands.size();
    for (const char* kind = instruction->operands; *kind; kind++) {
      if (kind != instruction->operands) expect(",");
      operand(*kind, instruction->listed, operation);
    }
    expect(";");
    reading_.clear();
    first_operand_.push_back(first);
    program_.operations.push_back(operation);
  }

  // {…}, {
  bool is_list_behind_list() const {
    size_t ahead = 0;
    while (at_ + ahead < tokens_.size() && !is("}", ahead)) ahead++;
    return is("{", ahead + 2);
  }

  void list(std::vector<uint32_t>& operands, int count) {
    expect("{");
    for (int i = 0; i < count; i++) {
      if (i) expect(",");
      operands.push_back(slot_of(next()));
    }
    expect("}");
  }

  void operand(char kind, int listed, Operation& operation) {
    std::vector<uint32_t>& operands = program_.operands;
    switch (kind) {
      case 'd': case 's':
        operands.push_back(slot_of(next()));
        return;
      case '4': case '2': case '1':
        list(operands, kind - '0');
        return;
      case 'm': case 'a': {
        expect("[");
        operands.push_back(slot_of(next()));
        if (is("+")) {
          next();
          uint64_t offset;
          if (!number(next(), offset)) wrong("an offset that is no number");
          operation.offset = int64_t(offset);
        }
        if (kind == 'a' && operation.offset) wrong("an offset where none is modelled");
        expect("]");
        return;
      }
      case 'L':
        list(operands, listed);
        return;
      case '_':
        expect("_");
        return;
      case 'e':
        expect("_");
        expect("|");
        operands.push_back(slot_of(next()));
        return;
      case 't':
        expect("[");
        operands.push_back(slot_of(next()));
        expect(",");
        list(operands, 4);
        expect("]");
        return;
      case 'l':
        targets_.push_back({program_.operations.size(), next()});
        return;
      case 'i': {
        uint64_t value;
        if (!number(next(), value)) wrong("a number expected");
        operation.offset = int64_t(value);
        return;
      }
    }
  }

  // Constants first, then registers; labels become positions.
  void finish() {
    const uint32_t constants = uint32_t(program_.constants.size());
    auto place = [&](uint32_t& slot) { slot = slot & CONSTANT ? slot & ~CONSTANT : slot + constants; };
    for (uint32_t& slot : program_.operands) place(slot);
    for (Program::Filled& filled : program_.specials) place(filled.slot);
    for (uint32_t& slot : program_.param_addresses) place(slot);
    program_.slots = constants + registers_;
    for (size_t i = 0; i < program_.operations.size(); i++) {
      Operation& operation = program_.operations[i];
      operation.slot = program_.operands.data() + first_operand_[i];
      if (operation.guard != NO_GUARD) place(operation.guard);
    }
    for (auto& [operation, label] : targets_) {
      auto found = labels_.find(label);
      if (found == labels_.end()) wrong("there is no label " + label);
      program_.operations[operation].offset = found->second;
    }
    // A label at the end stands for the end.
    Operation end{};
    end.guard = NO_GUARD;
    end.run = find_instruction("ret")->run;
    program_.operations.push_back(end);
  }

  static constexpr uint32_t CONSTANT = 0x80000000, NONE = 0xffffffff;

  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::string reading_;  // the instruction whose operands are being read
  Program& program_;
  std::string parameter_;
  uint32_t parameter_slot_ = NONE;
  uint32_t registers_ = 0;
  std::vector<std::map<std::string, uint32_t>> scopes_;
  std::map<std::string, uint64_t> symbols_;
  std::map<uint64_t, uint32_t> constants_;
  std::map<Special, uint32_t> special_slots_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, std::string>> targets_;
  std::vector<size_t> first_operand_;
};

}  // namespace

bool parse_ptx(const std::string& text, const std::string& kernel, Program& program, std::string& error) {
  try {
    Parser(text, program).kernel(kernel);
    return true;
  } catch (const std::runtime_error& wrong) {
    error = wrong.what();
    return false;
  }
}

}  // namespace simt
