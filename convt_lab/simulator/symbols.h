// What the symbol table of a kernel's library tells of the kernel.

#pragma once

#include <elf.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace cudasim {

// Bytes of the shared arrays that a kernel declares in its own body: the thread-local variables
// whose mangled names hold the kernel's. Those of functions that it calls are not among them.
// `kernel` is its place in the library at `path`.
inline std::size_t own_shared_bytes(const char* path, std::uint64_t kernel) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto read = [&bytes](auto& value, std::uint64_t place) {
    if (place > bytes.size() || sizeof(value) > bytes.size() - place) return false;
    std::memcpy(&value, bytes.data() + place, sizeof(value));
    return true;
  };
  const auto text = [&bytes](std::uint64_t place) {
    std::string found;
    while (place < bytes.size() && bytes[place] != '\0') found += bytes[place++];
    return found;
  };

  Elf64_Ehdr head;
  if (!read(head, 0) || std::memcmp(head.e_ident, ELFMAG, SELFMAG) != 0) return 0;
  Elf64_Shdr table{}, names{};
  for (int i = 0; i < head.e_shnum && table.sh_type != SHT_SYMTAB; ++i) {
    if (!read(table, head.e_shoff + i * std::uint64_t{sizeof(table)})) return 0;
  }
  if (table.sh_type != SHT_SYMTAB) return 0;
  if (!read(names, head.e_shoff + table.sh_link * std::uint64_t{sizeof(names)})) return 0;

  std::vector<Elf64_Sym> arrays;  // all that are thread-local
  std::string of_kernel;  // Z6kernelPfE of _Z6kernelPf; Z6kernelE of a kernel with C linkage
  for (std::uint64_t place = 0; place + sizeof(Elf64_Sym) <= table.sh_size;
       place += sizeof(Elf64_Sym)) {
    Elf64_Sym symbol;
    if (!read(symbol, table.sh_offset + place)) return 0;
    const int type = ELF64_ST_TYPE(symbol.st_info);
    if (type == STT_TLS) arrays.push_back(symbol);
    if (type != STT_FUNC || symbol.st_value != kernel) continue;
    const std::string name = text(names.sh_offset + symbol.st_name);
    const bool is_mangled = name.rfind("_Z", 0) == 0;
    of_kernel = is_mangled ? name.substr(1) + "E" : "Z" + std::to_string(name.size()) + name + "E";
  }
  std::size_t sum = 0;
  for (const Elf64_Sym& array : arrays) {
    // _ZZ6kernelPfE5array, and with one Z more for each function in the kernel that it is in.
    const std::string name = text(names.sh_offset + array.st_name);
    const std::size_t start = name.find_first_not_of('Z', 1);
    if (name.rfind("_ZZ", 0) == 0 && name.compare(start - 1, of_kernel.size(), of_kernel) == 0) {
      sum += array.st_size;
    }
  }
  return sum;
}

}  // namespace cudasim
