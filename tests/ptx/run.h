// Kernels of a few lines, named `test`, with one parameter: where some words are.
#pragma once

#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "../native/check.h"
#include "module.h"

namespace pddm::ptx {

struct Ran {
  std::vector<uint64_t> words;
  std::string error;
};

inline Ran run_text(const std::string& text, const emulation::Launch& where, std::vector<uint64_t> words) {
  Ran ran{std::move(words), ""};
  try {
    const Module module = parse(text);
    uint64_t* const to = ran.words.data();
    launch(module.kernel("test"), where, {{&to, 8, 8}});
  } catch (const std::exception& error) {
    ran.error = error.what();
  }
  return ran;
}

inline void expect_refused(const char* what, const Ran& ran, const char* because) {
  CHECK(ran.error.find(because) != std::string::npos, "%s: '%s' lacks '%s'", what, ran.error.c_str(), because);
}

}  // namespace pddm::ptx
