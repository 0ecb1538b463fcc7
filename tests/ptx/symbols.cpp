#include "symbols.h"

#include <elf.h>
#include <link.h>

#include <cctype>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

namespace pddm::ptx {
namespace {

std::string without_marks(const std::string& name) {
  std::string plain;
  for (size_t at = 0; at < name.size(); ++at)
    if (name[at] != 'L' || at + 1 == name.size() || !std::isdigit(static_cast<unsigned char>(name[at + 1])))
      plain += name[at];
  return plain;
}

struct Symbols {
  std::map<uintptr_t, std::string> functions;
  std::map<std::pair<std::string, std::string>, uintptr_t> variables;  // by source and name

  Symbols() {
    uintptr_t base = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* base) {
          *static_cast<uintptr_t*>(base) = info->dlpi_addr;
          return 1;  // the program is the first
        },
        &base);
    std::ifstream stream("/proc/self/exe", std::ios::binary);
    const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
    const auto at = [&](size_t offset) { return file.data() + offset; };
    const auto& header = *reinterpret_cast<const ElfW(Ehdr)*>(at(0));
    const auto* const sections = reinterpret_cast<const ElfW(Shdr)*>(at(header.e_shoff));
    for (int s = 0; s < header.e_shnum; ++s) {
      if (sections[s].sh_type != SHT_SYMTAB) continue;
      const char* const names = at(sections[sections[s].sh_link].sh_offset);
      const auto* const symbols = reinterpret_cast<const ElfW(Sym)*>(at(sections[s].sh_offset));
      std::string source;  // of the local symbols that follow
      for (size_t y = 0; y < sections[s].sh_size / sizeof *symbols; ++y) {
        const ElfW(Sym) & symbol = symbols[y];
        const std::string name = names + symbol.st_name;
        switch (symbol.st_info & 0xf) {
          case STT_FILE: source = name; break;
          case STT_FUNC: functions.emplace(base + symbol.st_value, without_marks(name)); break;
          case STT_OBJECT: variables.emplace(std::pair(source, without_marks(name)), base + symbol.st_value); break;
        }
      }
      return;
    }
    throw std::runtime_error("this program has been stripped of its symbols");
  }
};

const Symbols& symbols() {
  static const Symbols all;
  return all;
}

}  // namespace

std::string function_name(const void* at) {
  const auto found = symbols().functions.find(reinterpret_cast<uintptr_t>(at));
  return found == symbols().functions.end() ? "" : found->second;
}

void* find_variable(const std::string& source, const std::string& name) {
  const auto found = symbols().variables.find({source, name});
  return found == symbols().variables.end() ? nullptr : reinterpret_cast<void*>(found->second);
}

}  // namespace pddm::ptx
