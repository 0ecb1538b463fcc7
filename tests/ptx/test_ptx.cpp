// Every kernel of an arithmetic, as nvcc compiled it, through every door of the backend: test_ptx ARITHMETIC MODULE.ptx
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "../native/check.h"
#include "cases.h"

using namespace pddm;

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: test_ptx ARITHMETIC MODULE.ptx\n"), 2;
  const ptx::Module module = ptx::read_kernels(arguments[1], ptx::contents(arguments[2]));
  for (const ptx::Case& c : ptx::cases_for(module.target)) {
    if (ptx::kUnfused && c.sizes.combined > 200) continue;
    const auto start = std::chrono::steady_clock::now();
    const std::string found = ptx::difference(arguments[1], module, c);
    std::printf("%ld rows of %ld, %ld and %ld outputs: %.1f s\n", long(c.sizes.n), long(c.sizes.dim),
                long(c.sizes.hidden), long(c.sizes.combined),
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    CHECK(found.empty(), "%s", found.c_str());
  }
  for (const auto& [name, kernel] : module.kernels) {
    const auto executed =
        std::count_if(kernel.code.begin(), kernel.code.end(), [](const auto& i) { return i.executed; });
    std::printf("%5zd of %5zu instructions: %s\n", size_t(executed), kernel.code.size(), name.c_str());
    // Of a module with warpgroups those that are without are another test's, and what is left out here is, too.
    if (ptx::kUnfused || (module.target == "sm_90a" && name.find("hopper") == std::string::npos)) continue;
    CHECK(executed > 0, "%s has not run", name.c_str());
  }
  return failures != 0;
}
