// What the driver is given to load: machine code in an ELF file, or PTX. Only names and the architecture are read.
#include <cstdlib>
#include <cstring>

#include "state.hpp"

namespace driver {
namespace {

constexpr uint16_t EM_CUDA = 190;

struct ElfHeader {
  unsigned char identity[16];
  uint16_t type, machine;
  uint32_t version;
  uint64_t entry, program_headers, section_headers;
  uint32_t flags;
  uint16_t size, program_header_size, program_headers_count, section_header_size, section_count, section_names;
};

struct SectionHeader {
  uint32_t name, type;
  uint64_t flags, address, offset, size;
  uint32_t link, info;
  uint64_t alignment, entry_size;
};

Code parse_elf(const char* data, Image& image) {
  ElfHeader header;
  memcpy(&header, data, sizeof header);
  const bool wide = header.identity[4] == 2, little = header.identity[5] == 1;
  if (!wide || !little || header.machine != EM_CUDA) return INVALID_IMAGE;
  // Since version 8 of the ABI the architecture stands in the second byte.
  image.ptx = false;
  image.architecture = int(header.identity[8] >= 8 ? header.flags >> 8 & 0xff : header.flags & 0xff);
  auto section = [&](int n) {
    SectionHeader section;
    memcpy(&section, data + header.section_headers + n * sizeof section, sizeof section);
    return section;
  };
  const char* names = data + section(header.section_names).offset;
  for (int n = 0; n < header.section_count; n++) {
    const char* name = names + section(n).name;
    constexpr char CODE[] = ".text.";
    if (strncmp(name, CODE, strlen(CODE)) == 0) image.names.push_back(name + strlen(CODE));
  }
  return SUCCESS;
}

// The word behind `key`, at the start of a line.
std::string word_after(const std::string& text, const char* key) {
  const size_t at = text.find(key);
  if (at == std::string::npos) return "";
  const size_t begin = text.find_first_not_of(" \t", at + strlen(key));
  return text.substr(begin, text.find_first_of(" \t\r\n,(", begin) - begin);
}

Code parse_ptx(const std::string& text, int driver_version, Image& image) {
  const std::string version = word_after(text, "\n.version"), target = word_after(text, "\n.target");
  if (version.empty() || target.rfind("sm_", 0) != 0) return INVALID_PTX;
  // CUDA 12.N knows PTX 8.N, 13.N knows 9.N.
  const int newest = driver_version / 1000 * 10 - 40 + driver_version % 1000 / 10;
  const size_t dot = version.find('.');
  if (dot == std::string::npos) return INVALID_PTX;
  if (atoi(version.c_str()) * 10 + atoi(version.c_str() + dot + 1) > newest) return UNSUPPORTED_PTX_VERSION;
  image.ptx = true;
  image.text = text;
  image.architecture = atoi(target.c_str() + 3);
  for (size_t at = 0; (at = text.find(".entry", at)) != std::string::npos; at++)
    image.names.push_back(word_after(text.substr(at), ".entry"));
  return SUCCESS;
}

}  // namespace

Code parse(const void* data, int driver_version, Image& image) {
  const char* bytes = static_cast<const char*>(data);
  if (memcmp(bytes, "\x7f" "ELF", 4) == 0) return parse_elf(bytes, image);
  // Text starts with a comment or a directive.
  if (*bytes == '/' || *bytes == '.' || *bytes == '\n') return parse_ptx("\n" + std::string(bytes), driver_version, image);
  return INVALID_IMAGE;
}

}  // namespace driver
