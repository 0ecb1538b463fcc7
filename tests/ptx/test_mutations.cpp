// Whether the comparison of test_ptx would notice: the text is spoiled on purpose, in one way at a time, and must then
// be refused, fail or answer otherwise.
//
//   test_mutations ARITHMETIC MODULE.ptx        every line that a mutation fits at once
//   test_mutations ARITHMETIC MODULE.ptx 20     and after that 20 of those lines alone, which are only reported: some
//                                               lines can be spoiled without harm
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <regex>
#include <set>
#include <sstream>

#include "../native/check.h"
#include "cases.h"

namespace {

using namespace pddm;

struct Mutation {
  const char *name, *from, *to;
  const char* within = "";  // kernels with this in their names
};
const Mutation kMutations[] = {
    {"A's rows swapped", R"((mma\.[^{]*\{[^}]*\}, \{)([^,]*), ([^,]*), )", "$1$3, $2, "},
    {"A's depths swapped", R"((mma\.[^{]*\{[^}]*\}, \{[^,]*, )([^,]*), ([^,]*), )", "$1$3, $2, "},
    {"B's depths swapped", R"((mma\.[^{]*\{[^}]*\}, \{[^}]*\}, \{)([^,]*), ([^}]*)\})", "$1$3, $2}"},
    {"the sums' columns swapped", R"((mma\.[^{]*\{)([^,]*), ([^,]*), )", "$1$3, $2, "},
    {"A by columns", R"(\.row\.col\.)", ".col.col."},
    {"ldmatrix: matrices swapped", R"((ldmatrix[^{]*\{[^,]*, )([^,]*), ([^,]*), )", "$1$3, $2, "},
    {"ldmatrix: transposed", R"((ldmatrix.*x4)\.shared)", "$1.trans.shared"},
    {"ldmatrix: not transposed", R"((ldmatrix.*x4)\.trans)", "$1"},
    {"ldmatrix: every row a row later", R"((ldmatrix.*\[[^\]]*)\])", "$1+64]"},
    {"cp.async: one group too few awaited", R"(cp\.async\.wait_group \s*0;)", "cp.async.wait_group 1;"},
    {"cp.async: one group too few awaited, of two", R"(cp\.async\.wait_group \s*1;)", "cp.async.wait_group 2;"},
    {"cp.async: nothing awaited", R"(cp\.async\.wait_group .*;)", ""},
    {"cp.async: no groups", R"(cp\.async\.commit_group;)", ""},
    {"cp.async: 8 bytes", R"((cp\.async\.cg.*), 16;)", "$1, 8;"},
    {"cp.async: from 16 bytes later", R"((cp\.async\.cg[^\[]*\[[^\]]*\], \[[^+]*)\+\d*\])", "$1+16]"},
    {"no barriers", R"(bar\.sync\s+0;)", ""},
    {"shfl: bfly as idx", R"(shfl\.sync\.bfly)", "shfl.sync.idx"},
    {"shfl: up as down", R"(shfl\.sync\.up)", "shfl.sync.down"},
    {"vote: of nobody", R"((vote\.sync\.ballot\.b32\s+\S+) %p\d+)", "$1 0"},
    {"fma: factor and addend swapped", R"((fma\.rn\.f\d+\s+\S+ \S+) (\S+), (\S+);)", "$1 $3, $2;"},
    {"shared loads as global ones", R"(ld\.shared)", "ld.global"},
    {"shared stores as global ones", R"(st\.shared)", "st.global"},
    {"global loads as shared ones", R"(ld\.global(\.nc)?)", "ld.shared"},
    {"parameters as global memory", R"(ld\.param)", "ld.global"},
    {"generic addresses not made so", R"(cvta\.shared\.u64)", "mov.u64"},
    {"NaNs lost in relu", R"(max\.NaN\.f32)", "max.f32"},
    {"numbers taken for NaNs", R"(setp\.num\.f)", "setp.nan.f"},
    {"NaNs taken for numbers", R"(setp\.nan\.f)", "setp.num.f"},
    {"weights' halves swapped", R"((cvt\.rn\.\w+x2\.f32 \S+) (\S+), ([^;]*);)", "$1 $3, $2;", "prepare"},
    {"rows' halves swapped", R"((cvt\.rn\.\w+x2\.f32 \S+) (\S+), ([^;]*);)", "$1 $3, $2;", "score"},
    {"bf16 as f16", R"(cvt\.rn\.bf16x2)", "cvt.rn.f16x2"},
    {"f16 as bf16", R"(cvt\.rn\.f16x2)", "cvt.rn.bf16x2"},
    {"tf32 not rounded", R"(cvt\.rna\.tf32\.f32)", "mov.b32"},
    {"one step too many", R"(setp\.lt\.s32)", "setp.le.s32"},
    {"choices swapped", R"((selp\.\w+\s+\S+) (\S+), (\S+), )", "$1 $3, $2, "},
    {"best as sum", R"(atom\.global\.max)", "atom.global.add"},
    {"words joined elsewhere", R"((bfi\.b64.*), 32, 32;)", "$1, 31, 32;"},
    {"block's number as thread's", R"(%tid\.x)", "%ctaid.x"},
    {"no roots", R"(sqrt\.rn)", "mov"},
    {"quotients as products", R"(div\.rn)", "mul.rn"},

    // Hopper's.
    {"wgmma: nothing awaited", R"(wgmma\.wait_group.*;)", ""},
    {"wgmma: one group too few awaited", R"((wgmma\.wait_group\S*\s+)0;)", "$1 1;"},
    {"wgmma: no fence", R"(wgmma\.fence.*;)", ""},
    {"wgmma: no groups", R"(wgmma\.commit_group.*;)", ""},
    {"wgmma: A's second register for its first", R"((wgmma[^{]*\{[^}]*\}, \{)([^,]*), ([^,]*), )", "$1$3, $3, "},
    {"wgmma: sums always added to", R"(setp\.ne\.b32 p, (\S+), 0;)", "setp.eq.b32 p, $1, $1;"},
    {"wgmma: sums never added to", R"(setp\.ne\.b32 p, (\S+), 0;)", "setp.ne.b32 p, $1, $1;"},
    {"wgmma: bf16 as f16", R"(\.f32\.bf16\.bf16)", ".f32.f16.f16"},
    {"wgmma: B of fewer columns", R"((wgmma\S*n)(?:192|256)(k16[^{]*\{(?:[^,]*, ){63}[^,]*)[^}]*\})", "$01128$2}"},
    {"descriptors: rows of 128 bytes", "-9223371899415756800", "4611686293305360384"},
    {"descriptors: rows not swizzled", "-9223371899415756800", "137439019008"},
    {"descriptors: eight rows further apart", "-9223371899415756800", "-9223371624537849856"},
    {"stores not shown", R"(fence\.proxy\.async.*;)", ""},
    {"barriers not published", R"(fence\.mbarrier_init.*;)", ""},
    {"barriers of more arrivals", R"((mbarrier\.init.*\], )\S+;)", "$1 9;"},
    {"barriers of one arrival", R"((mbarrier\.init.*\], )\S+;)", "$1 1;"},
    {"bytes announced that do not come", R"((mbarrier\.arrive\.expect_tx.*\], )\S+;)", "$1 1048560;"},
    {"bytes not announced", R"((mbarrier\.arrive\.expect_tx.*\], )\S+;)", "$1 0;"},
    {"nobody announces", R"(mbarrier\.arrive\.expect_tx.*;)", ""},
    {"nobody arrives", R"(mbarrier\.arrive\.shared.*;)", ""},
    {"arrivals at the first block alone", R"((mapa\S* \S+ \S+) \S+;)", "$1 0;"},
    {"always the first parity", R"((mbarrier\.try_wait.*\], )\S+;)", "$1 0;"},
    {"no second try", R"((selp\.u32 \S+ 1), 0, p;)", "$1, 1, p;"},
    {"copies to one block", R"((cp\.async\.bulk.*\], )\S+;)", "$1 1;"},
    {"copies from 16 bytes later", R"((cp\.async\.bulk[^\[]*\[[^\]]*\], \[[^\]]*)\])", "$1+16]"},
    {"copies of 16 bytes", R"((cp\.async\.bulk[^\[]*\[[^\]]*\], \[[^\]]*\], )[^,]*)", "$01 16"},
    {"no copies", R"(cp\.async\.bulk.*;)", ""},
    {"clusters that do not meet", R"(barrier\.cluster.*;)", ""},
    {"more registers than there are", R"((setmaxnreg\.inc\S*) \d+;)", "$1 256;"},
    {"fewer registers than products need", R"(setmaxnreg\.inc\S* \d+;)", "setmaxnreg.dec.sync.aligned.u32 24;"},
    {"registers that nobody gives up", R"(setmaxnreg\.dec.*;)", ""},
    {"barriers of half a warpgroup", R"((bar\.sync\s+\S+ )128;)", "$1 64;"},
    {"no barriers of a warpgroup", R"(bar\.sync\s+\S+ 128;)", ""},
};

// Every other way, for what goes unnoticed in one.
constexpr const char* kOrders[] = {"ascending", "descending", "shuffled"};
constexpr size_t kPortableInTurn[] = {4, 2, 3, 6, 5, 7}, kWarpgroupsInTurn[] = {3, 2, 4, 5, 6};
constexpr size_t kCasesAlone = 3;
constexpr unsigned kSeconds = 120;

using Lines = std::vector<std::string>;

std::vector<const ptx::Case*> cases_in_turn(const std::string& target) {
  std::vector<const ptx::Case*> cases;
  if (target == "sm_90a")
    for (size_t c : kWarpgroupsInTurn) cases.push_back(&ptx::cases_for(target)[c]);
  else
    for (size_t c : kPortableInTurn) cases.push_back(&ptx::cases_for(target)[c]);
  return cases;
}

// What every match of it begins with, or soon after: looked for first, for that is quick.
std::string key_of(const std::string& pattern) {
  const auto letter = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '-'; };
  const auto first = std::find_if(pattern.begin(), pattern.end(), letter);
  return {first, std::find_if_not(first, pattern.end(), letter)};
}

std::string joined(const Lines& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + '\n';
  return text;
}

std::string noticed_here(const std::string& arithmetic, const Lines& lines, size_t cases) {
  try {
    const ptx::Module module = ptx::read_kernels(arithmetic, joined(lines));
    const auto in_turn = cases_in_turn(module.target);
    for (size_t turn = 0; turn < std::min(cases, in_turn.size()); ++turn) {
      for (const char* order : kOrders) {
        setenv("PDDM_EMULATION_ORDER", order, 1);
        const std::string found = ptx::difference(arithmetic, module, *in_turn[turn]);
        if (!found.empty()) return found;
      }
    }
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// How it is noticed; empty: it is not. In a process of its own, for it may touch any memory, or never end.
std::string noticed(const std::string& arithmetic, const Lines& lines, size_t cases = ~size_t(0)) {
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("no pipe");
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);  // what is said of a fault
    alarm(kSeconds);
    const std::string how = noticed_here(arithmetic, lines, cases);
    _exit(write(ends[1], how.data(), how.size()) < 0);
  }
  close(ends[1]);
  std::string how;
  char buffer[4096];
  for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;) how.append(buffer, size_t(got));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) how += WTERMSIG(status) == SIGALRM ? "it does not end" : "it crashes";
  return how;
}

// Of the text, from 0, those that a run of all cases has come to.
std::set<size_t> executed_lines(const std::string& arithmetic, const std::string& text) {
  const ptx::Module module = ptx::read_kernels(arithmetic, text);
  for (const ptx::Case* c : cases_in_turn(module.target)) ptx::difference(arithmetic, module, *c);
  std::set<size_t> lines;
  for (const auto& [name, kernel] : module.kernels)
    for (size_t i = 0; i < kernel.code.size(); ++i)
      if (kernel.code[i].executed)
        lines.insert(std::strtoul(kernel.text[i].c_str() + std::strlen("ptx, line "), nullptr, 10) - 1);
  return lines;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) return std::fprintf(stderr, "usage: test_mutations ARITHMETIC MODULE.ptx [LINES]\n"), 2;
  const std::string arithmetic = arguments[1], text = ptx::contents(arguments[2]);
  const size_t alone = count == 4 ? std::strtoul(arguments[3], nullptr, 10) : 0;
  // Of a module with warpgroups the kernels that have them: the others are another module's.
  const ptx::Module module = ptx::read_kernels(arithmetic, text);
  const char* const everywhere = module.target == "sm_90a" ? "hopper" : "";
  Lines lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);

  // What is not spoiled differs in nothing; and what it is compared with the processes below need not ask for again.
  setenv("PDDM_EMULATION_ORDER", kOrders[0], 1);
  const std::string found = ptx::difference(arithmetic, module, *cases_in_turn(module.target)[0]);
  CHECK(found.empty(), "%s", found.c_str());
  const std::set<size_t> executed = alone ? executed_lines(arithmetic, text) : std::set<size_t>();

  for (const Mutation& mutation : kMutations) {
    const std::regex from(mutation.from);
    const std::string key = key_of(mutation.from);
    Lines spoiled = lines;
    std::vector<size_t> hit;
    const char* const kernels = *mutation.within ? mutation.within : everywhere;
    bool within = true;
    for (size_t l = 0; l < lines.size(); ++l) {
      if (lines[l].find(".entry") != std::string::npos) within = lines[l].find(kernels) != std::string::npos;
      if (!within || lines[l].find(key) == std::string::npos) continue;
      spoiled[l] = std::regex_replace(lines[l], from, mutation.to);
      if (spoiled[l] != lines[l] && (!alone || executed.count(l))) hit.push_back(l);
    }
    if (hit.empty()) continue;
    const std::string how = noticed(arithmetic, spoiled);
    CHECK(!how.empty(), "%s: nobody notices", mutation.name);
    std::printf("%s, %zu lines: %s\n", mutation.name, hit.size(), how.substr(0, 300).c_str());
    std::fflush(stdout);
    const size_t tries = std::min(alone, hit.size());
    for (size_t t = 0; t < tries; ++t) {
      const size_t l = hit[t * hit.size() / tries];
      Lines once = lines;
      once[l] = spoiled[l];
      if (noticed(arithmetic, once, kCasesAlone).empty())
        std::printf("  alone unnoticed: line %zu: %s\n", l + 1, lines[l].c_str());
    }
  }
  return failures != 0;
}
