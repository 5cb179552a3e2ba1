// Return addresses to source lines, through addr2line and only once something is reported: a run without a report pays
// nothing.
#include "sites.hpp"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <elf.h>
#include <unistd.h>
#endif

namespace simt {
namespace {

// Bytes that no file name and no buffer name holds.
constexpr char OPEN = '\x01', CLOSE = '\x02';

// The byte before the return address: it belongs to the call, the return address perhaps to the next line.
const char* call_of(Pc pc) { return &image_anchor + static_cast<int32_t>(pc) - 1; }

// What addr2line wants to be given: file offsets for a position-independent image, addresses for a fixed one.
bool image_of(const char* address, std::string& path, uintptr_t& offset) {
  Dl_info info;
  if (!dladdr(address, &info) || !info.dli_fname) return false;
  path = info.dli_fname;
  offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase);
#if defined(__linux__)
  const auto* header = static_cast<const unsigned char*>(info.dli_fbase);
  uint16_t type;
  memcpy(&type, header + 16, sizeof type);  // e_type, at the same place in 32- and 64-bit headers
  if (type == ET_EXEC) offset = reinterpret_cast<uintptr_t>(address);
  if (access(path.c_str(), R_OK) != 0) path = "/proc/self/exe";
#endif
  return true;
}

std::string fallback(const char* address) {
  Dl_info info;
  char text[256];
  if (dladdr(address, &info) && info.dli_sname)
    snprintf(text, sizeof text, "%s+0x%zx", info.dli_sname, size_t(address - static_cast<const char*>(info.dli_saddr)));
  else
    snprintf(text, sizeof text, "%p", static_cast<const void*>(address));
  return text;
}

bool ends_with(const std::string& text, const char* tail) {
  size_t n = strlen(tail);
  return text.size() >= n && text.compare(text.size() - n, n, tail) == 0;
}

// One run of addr2line for all of `pcs`: reading a big test binary's debug information is what takes the time.
void look_up(const std::vector<Pc>& pcs, std::map<Pc, std::string>& known) {
  std::string path, command;
  uintptr_t offset = 0;
  for (Pc pc : pcs) {
    known[pc] = fallback(call_of(pc));
    if (!image_of(call_of(pc), path, offset)) return;
    char number[32];
    snprintf(number, sizeof number, " 0x%zx", size_t(offset));
    command += number;
  }
  command = "addr2line -a -i -s -e '" + path + "'" + command + " 2>/dev/null";
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return;
  char line[1024];
  size_t next = 0;
  std::string chain;
  auto finish = [&] {
    if (next > 0 && !chain.empty()) known[pcs[next - 1]] = chain;
    chain.clear();
  };
  bool above_kernel = false;
  while (fgets(line, sizeof line, pipe)) {
    line[strcspn(line, "\n")] = 0;
    if (strncmp(line, "0x", 2) == 0) {  // -a: the address announces a new site
      finish();
      next++;
      above_kernel = false;
      continue;
    }
    std::string place = line;
    if (size_t note = place.find(" (discriminator"); note != std::string::npos) place.resize(note);
    if (place[0] == '?') continue;
    above_kernel |= place.compare(0, 10, "entry.hpp:") == 0;  // from here outwards nothing is the kernel's
    if (above_kernel || ends_with(chain, place.c_str())) continue;
    chain += (chain.empty() ? "" : " <- ") + place;
  }
  finish();
  pclose(pipe);
}

}  // namespace

const char image_anchor = 0;
SIMT_OF_OS_THREAD Pc interpreted_at = 0;

std::string at(Pc pc) { return OPEN + std::to_string(pc) + CLOSE; }

std::string symbolise(const std::string& message) {
  static std::mutex mutex;
  static std::map<Pc, std::string> known;
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<Pc> missing;
  auto each_site = [&](auto found) {
    size_t from = 0;
    for (size_t open; (open = message.find(OPEN, from)) != std::string::npos;) {
      size_t close = message.find(CLOSE, open);
      if (close == std::string::npos) return;
      found(open, close, static_cast<Pc>(std::stoul(message.substr(open + 1, close - open - 1))));
      from = close + 1;
    }
  };
  each_site([&](size_t, size_t, Pc pc) {
    if (is_interpreted(pc)) known[pc] = "PTX line " + std::to_string(pc & ~INTERPRETED);
    else if (known.emplace(pc, "").second) missing.push_back(pc);
  });
  if (!missing.empty()) look_up(missing, known);
  std::string text;
  size_t copied = 0;
  each_site([&](size_t open, size_t close, Pc pc) {
    text.append(message, copied, open - copied);
    text += known[pc];
    copied = close + 1;
  });
  return text.append(message, copied, std::string::npos);
}

}  // namespace simt
